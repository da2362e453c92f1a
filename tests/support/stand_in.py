# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The GPU's code in an engine on the CPU: only the platform's answers, the device's
memory and the functions of vLLM's CUDA library are stood in for."""

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest

_FUSED_MOE = "vllm.model_executor.layers.fused_moe"
_QUANTISATION = "vllm.model_executor.layers.quantization"

_CHOOSING = (
    *(
        f"{_FUSED_MOE}.oracle.{name}"
        for name in ("fp8", "int_wna16", "mxfp4", "unquantized")
    ),
    *(f"{_FUSED_MOE}.experts.{name}_moe" for name in ("cpu", "marlin", "triton")),
    *(
        f"{_QUANTISATION}.{name}"
        for name in (
            "auto_awq",
            "inc.schemes.inc_wna16_scheme",
            "utils.marlin_utils",
            "utils.marlin_utils_fp4",
            "utils.marlin_utils_fp8",
        )
    ),
)
"""Modules of vLLM that ask for the platform when they choose the kernel of a layer, and
nothing that leads to a GPU afterwards."""


def gpu_of(capability: tuple[int, int]) -> Any:
    """This platform, which says that it is CUDA with a GPU of that capability."""
    from vllm.platforms import current_platform
    from vllm.platforms.interface import DeviceCapability, PlatformEnum

    class Gpu(type(current_platform)):  # type: ignore[misc]
        _enum = PlatformEnum.CUDA
        get_device_capability = classmethod(
            lambda cls, device_id=0: DeviceCapability(*capability)
        )
        supports_fp8 = classmethod(lambda cls: capability >= (8, 9))

    return Gpu()


def stand_in(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (8, 9)
) -> None:
    """Stock chooses its kernels for experts as on a GPU of that capability without
    FlashInfer, DeepGEMM and vLLM's CUTLASS; the platform is CUDA in `backend.py` and
    `arguments.py`; nothing is pinned."""
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
    gpu = gpu_of(capability)
    for module in _CHOOSING:
        monkeypatch.setattr(import_module(module), "current_platform", gpu)
    monkeypatch.setattr(
        unquantized,
        "_get_priority_backends",
        lambda _: [unquantized.UnquantizedMoeBackend.TRITON],
    )
    cuda = SimpleNamespace(is_cuda=lambda: True, is_cpu=lambda: False)
    monkeypatch.setattr(backend, "current_platform", cuda)
    monkeypatch.setattr(arguments, "current_platform", cuda)
    monkeypatch.setattr(CudaBackend, "memory", lambda self, device: CPUMemory())
    monkeypatch.setattr(gather_kernel, "PROGRAMS", 2)
