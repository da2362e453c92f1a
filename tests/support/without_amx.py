# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Lets vLLM run its quantised experts on a CPU without AMX, in the tests alone: the
product opens no gate. What is opened, and why: `gate_plugin/cpu_moe_gates.py`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.support.gate_plugin import cpu_moe_gates

PLUGIN = str(Path(__file__).with_name("gate_plugin"))
"""In PYTHONPATH, it has every vLLM process open the gates."""


def open_gates(patch: pytest.MonkeyPatch) -> None:
    """In this process, its children, and those that it starts with its environment,
    until `patch` is undone."""
    cpu_moe_gates.register(patch.setattr)
    patch.syspath_prepend(PLUGIN)
    patch.setenv("PYTHONPATH", PLUGIN, prepend=os.pathsep)


@contextmanager
def gates_open() -> Iterator[None]:
    """For an engine's start and its runs: on vLLM 0.33, the kernel is fitted too."""
    with pytest.MonkeyPatch.context() as patch:
        open_gates(patch)
        yield


def kernel_is_here() -> bool:
    """Whether this build of vLLM has the kernel for this CPU."""
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    return hasattr(torch.ops._C, "fused_experts_cpu")
