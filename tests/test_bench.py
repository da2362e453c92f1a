# SPDX-License-Identifier: Apache-2.0
"""`make bench` runs; what it measures is no test's business."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "overhead.py"


def test_every_arm_is_measured():
    small = ["--rounds", "2", "--tokens", "4", "--steps", "20"]
    done = subprocess.run([sys.executable, SCRIPT, *small], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for policy in ("lru", "lfu"):
        assert f"│ {policy} " in done.stdout
    for batch in (1, 8):
        assert f"batch of {batch} " in done.stdout
    for arm in ("stock", "N = 31", "N = 16", "N = 8"):
        assert done.stdout.count(f"│ {arm} ") == 2, done.stdout
