# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""`make bench` prints a row for each arm; the figures are not tested."""

import subprocess
import sys

from tests.support import ROOT


def test_every_arm_is_measured():
    small = ["--rounds", "2", "--tokens", "4", "--steps", "20"]
    command = [sys.executable, "-m", "benchmarks.cpu.overhead", *small]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for policy in ("lru", "lfu"):
        assert f"│ {policy} " in done.stdout
    for batch in (1, 8):
        assert f"batch of {batch} " in done.stdout
    for arm in ("stock", "N = 31", "N = 16", "N = 8"):
        assert done.stdout.count(f"│ {arm} ") == 2, done.stdout
