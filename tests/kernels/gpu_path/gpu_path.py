# SPDX-License-Identifier: Apache-2.0
"""The GPU's code in an engine on the CPU: only the platform's answers and the functions of vLLM's
CUDA library are stood in for. As a plugin of vLLM it does so in an engine's workers too."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock picks its Triton kernel; our layer believes it is on CUDA; nothing is pinned."""
    from cuda_library import stand_in_for_cuda_library
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
    from vllm.model_executor.layers.fused_moe.oracle import unquantized

    from vllm.model_executor.layers.fused_moe.expert_slots import (
        device_slots,
        pinning,
        routed_experts,
    )
    from vllm.plugins.moe_gpu_prefetch import conflicts

    stand_in_for_cuda_library(monkeypatch)
    monkeypatch.setattr(
        unquantized,
        "_get_priority_backends",
        lambda _: [unquantized.UnquantizedMoeBackend.TRITON],
    )
    monkeypatch.setattr(TritonExperts, "_supports_current_device", staticmethod(lambda: True))
    cuda = SimpleNamespace(is_cuda=lambda: True, is_cpu=lambda: False)
    monkeypatch.setattr(routed_experts, "current_platform", cuda)
    monkeypatch.setattr(conflicts, "current_platform", cuda)
    monkeypatch.setattr(pinning, "pin", lambda tensor: None)
    monkeypatch.setattr(device_slots, "_GATHER_PROGRAMS", 2)


def register() -> None:
    stand_in(pytest.MonkeyPatch())
