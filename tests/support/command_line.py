# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Runs the installed console commands as a user would."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vllm.plugins.moe_gpu_prefetch.command.main import main


def moe_prefetch(
    *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`vllm-moe-prefetch ARGUMENTS`."""
    return subprocess.run(
        [str(Path(sys.executable).with_name("vllm-moe-prefetch")), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )


def moe_prefetch_here(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The same in this process, which has imported vLLM already; returns the exit
    status."""
    monkeypatch.setattr(sys, "argv", ["vllm-moe-prefetch", *arguments])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        logging.disable(logging.NOTSET)
    return 0
