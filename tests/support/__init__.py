# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What tests, benchmarks and examples share: checkpoints with random weights, engines,
servers, processes of their own, and stand-ins for a GPU's driver and libraries."""

import os
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The repository; `python -m tests.support.NAME` works from here."""


def python_path(*first: Path) -> str:
    """PYTHONPATH with these directories before those that it has, which may hold
    another vLLM."""
    have = os.environ.get("PYTHONPATH")
    return os.pathsep.join([*map(str, first), *([have] if have else [])])


def wait_until(condition: Callable[[], object]) -> None:
    """Waits up to 20 seconds for `condition` to hold."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
