# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The benchmarks of the CPU, small: each prints a row for each engine. The figures are
not tested."""

import subprocess
import sys

from tests.support import ROOT


def printed(module: str, *options: str) -> str:
    command = [sys.executable, "-m", module, *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_slots_cost():
    small = ("--rounds", "2", "--tokens", "4", "--steps", "20")
    output = printed("benchmarks.cpu.overhead", *small)
    for policy in ("lru", "lfu", "lfu, traced"):
        assert f"│ {policy} " in output
    for batch in (1, 8):
        assert f"batch of {batch} " in output
    for engine in ("stock", "N = 31", "N = 16", "N = 8"):
        assert output.count(f"│ {engine} ") == 2, output


def test_what_loading_costs():
    output = printed("benchmarks.cpu.loading", "--repeats", "1", "--width", "64")
    for engine in ("stock", "slots", "shared, first", "shared, second"):
        assert f" {engine} │" in output, output
    assert "of one engine's" in output
