# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The GPU's code in an engine on the CPU: only the platform's answers, the device's
memory and the functions of vLLM's CUDA library are stood in for."""

from types import SimpleNamespace

import pytest


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock picks its Triton kernel; the platform is CUDA in `backend.py` and
    `arguments.py`; nothing is pinned."""
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
    from vllm.model_executor.layers.fused_moe.oracle import unquantized

    from tests.support.cuda_library import stand_in_for_cuda_library
    from vllm.model_executor.layers.fused_moe.expert_slots import backend
    from vllm.model_executor.layers.fused_moe.expert_slots.cpu.memory import CPUMemory
    from vllm.model_executor.layers.fused_moe.expert_slots.cuda import gather_kernel
    from vllm.model_executor.layers.fused_moe.expert_slots.cuda.backend import (
        CudaBackend,
    )
    from vllm.model_executor.layers.fused_moe.expert_slots.refusals import arguments

    stand_in_for_cuda_library(monkeypatch)
    monkeypatch.setattr(
        unquantized,
        "_get_priority_backends",
        lambda _: [unquantized.UnquantizedMoeBackend.TRITON],
    )
    monkeypatch.setattr(
        TritonExperts, "_supports_current_device", staticmethod(lambda: True)
    )
    cuda = SimpleNamespace(is_cuda=lambda: True, is_cpu=lambda: False)
    monkeypatch.setattr(backend, "current_platform", cuda)
    monkeypatch.setattr(arguments, "current_platform", cuda)
    monkeypatch.setattr(CudaBackend, "memory", lambda self, device: CPUMemory())
    monkeypatch.setattr(gather_kernel, "PROGRAMS", 2)
