# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A GPU on another machine. This process answers vLLM's questions about it, so that a
model can be measured as that GPU would run it. The process plans and computes nothing.

Call `pretend` before vLLM's other modules are imported: many ask for the platform
during their import.
"""

import sys
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import torch


@dataclass(frozen=True)
class Gpu:
    """A GPU as vLLM sees it.

    Attributes:
        name: its usual name, like "RTX 4090".
        capability: CUDA's compute capability.
        memory: bytes that `cudaMemGetInfo` reports as the total. Published sizes are
            larger.
    """

    name: str
    capability: tuple[int, int]
    memory: int


GPUS = {
    "T4": ((7, 5), 14.56),
    "RTX 3060": ((8, 6), 11.63),
    "RTX 3090": ((8, 6), 23.68),
    "A10": ((8, 6), 22.06),
    "RTX A6000": ((8, 6), 47.40),
    "A100-40": ((8, 0), 39.39),
    "A100-80": ((8, 0), 79.15),
    "RTX 4060 Ti 16GB": ((8, 9), 15.57),
    "RTX 4090": ((8, 9), 23.64),
    "L4": ((8, 9), 21.95),
    "L40S": ((8, 9), 44.39),
    "RTX 6000 Ada": ((8, 9), 47.37),
    "H100": ((9, 0), 79.10),
    "H200": ((9, 0), 139.72),
    "B200": ((10, 0), 178.30),
    "RTX 5080": ((12, 0), 15.46),
    "RTX 5090": ((12, 0), 31.36),
    "RTX PRO 6000": ((12, 0), 94.97),
}
"""Compute capability, and total memory in GiB as torch's out-of-memory errors state it
in public reports ("GPU 0 has a total capacity of 23.64 GiB"). Drivers differ by some
tens of MiB."""

UNNAMED = (8, 9)
"""Compute capability that is assumed if only the memory was given."""


def gpu_called(text: str) -> Gpu:
    """The GPU of that name, with or without its series ("4090").

    Raises:
        ValueError: the name is not in `GPUS`.
    """

    def short(name: str) -> str:
        plain = "".join(filter(str.isalnum, name.lower()))
        return plain.removeprefix("nvidia").removeprefix("geforce").removeprefix("rtx")

    for name, (capability, size) in GPUS.items():
        if short(text) == short(name):
            return Gpu(name, capability, int(size * (1 << 30)))
    raise ValueError(
        f"--gpu {text} is none of {', '.join(GPUS)}. Give its memory instead, like "
        "--gpu-memory 24GiB."
    )


pretended: Gpu | None = None
"""The GPU that this process answers for. Its memory may be set later than the rest."""


def _pretended() -> Gpu:
    assert pretended is not None
    return pretended


def pretend(gpu: Gpu) -> None:
    """Makes vLLM see GPUs like `gpu` in this process.

    Raises:
        ValueError: triton, which vLLM uses on a GPU, is not installed.
    """
    global pretended
    if find_spec("triton") is None:
        raise ValueError(
            "--gpu and --gpu-memory need triton, which is not installed. Install it, "
            "or run the command on the machine with the GPU."
        )
    pretended = gpu
    from triton.backends import backends
    from triton.runtime import driver

    backends["nvidia"].driver.is_active = staticmethod(lambda: True)
    driver.set_active(_TritonDriver(gpu.capability))
    _stand_in_for_libraries()
    from vllm.platforms.cuda import CudaPlatformBase
    from vllm.platforms.interface import DeviceCapability

    from vllm import platforms

    class Elsewhere(CudaPlatformBase):
        """vLLM's CUDA platform, without asking the driver."""

        get_device_capability = classmethod(
            lambda cls, *_, **__: DeviceCapability(*_pretended().capability)
        )
        get_device_name = classmethod(
            lambda cls, *_, **__: f"NVIDIA {_pretended().name}"
        )
        get_device_total_memory = classmethod(lambda cls, *_, **__: _pretended().memory)
        is_fully_connected = classmethod(lambda cls, *_, **__: False)
        is_integrated_gpu = classmethod(lambda cls, *_, **__: False)
        is_pin_memory_available = classmethod(lambda cls, *_, **__: True)
        num_compute_units = classmethod(lambda cls, *_, **__: 128)
        device_count = classmethod(lambda cls: 1024)
        get_device_numa_node = classmethod(lambda cls, *_, **__: None)

    platforms._current_platform = Elsewhere()  # type: ignore[assignment]
    # A vLLM for CPUs turns triton off.
    platforms.vllm_version_matches_substr = lambda substr: False


class _TritonDriver:
    """Answers what kernels' modules ask triton's driver during their import."""

    def __init__(self, capability: tuple[int, int]):
        self._capability = capability
        self.utils = SimpleNamespace(get_device_properties=lambda _: _PROPERTIES)

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 10 * self._capability[0] + self._capability[1], 32)

    def get_current_device(self) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return self._capability


_PROPERTIES = {"max_shared_mem": 99 << 10, "multiprocessor_count": 128, "warpSize": 32}

_LIBRARIES = (
    "vllm._C_stable_libtorch",
    "vllm._moe_C_stable_libtorch",
    "vllm.vllm_flash_attn._vllm_fa2_C",
    "vllm.vllm_flash_attn._vllm_fa3_C",
)
_QUESTIONS = {
    "cutlass_scaled_mm_supports_fp8": range(89, 200),
    "cutlass_scaled_mm_supports_block_fp8": range(90, 200),
    "cutlass_group_gemm_supported": range(90, 200),
    "cutlass_scaled_mm_supports_fp4": range(100, 200),
    "mxfp4_experts_quant_supported": range(100, 120),
}
"""Operators by which vLLM asks its library what a GPU can do, some during its import,
and the capabilities that they are true of."""

_kept: list[torch.library.Library] = []


def _stand_in_for_libraries() -> None:
    """Adds modules and operators that a vLLM for CPUs lacks, as does any vLLM without
    CUDA's driver."""
    for name in _LIBRARIES:
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        sys.modules[name] = module
    library = torch.library.Library("_C", "FRAGMENT")
    for name, able in _QUESTIONS.items():
        if not hasattr(torch.ops._C, name):
            library.define(f"{name}(int capability) -> bool")

            def answer(capability: int, able: range = able) -> bool:
                return capability in able

            library.impl(name, answer, "CompositeImplicitAutograd")
    _kept.append(library)


class _Operator:
    """An operator that is looked up while a model is built, and is never called."""

    def __getattr__(self, overload: str) -> "_Operator":
        if overload.startswith("__"):
            raise AttributeError(overload)
        return self


def answer_while_building() -> None:
    """Lets models be built for `pretended`: they look up operators and make streams.
    Call it after all imports: some modules register operators only if the library has
    theirs."""
    gpu = _pretended()
    stock = torch._ops._OpNamespace.__getattr__

    def found(self: Any, name: str) -> Any:
        try:
            return stock(self, name)
        except AttributeError:
            if self.name.startswith(
                ("_C", "_moe_C", "_vllm_fa")
            ) and not name.startswith("__"):
                return _Operator()
            raise

    torch._ops._OpNamespace.__getattr__ = found
    major, minor = gpu.capability
    properties = SimpleNamespace(
        name=f"NVIDIA {gpu.name}",
        major=major,
        minor=minor,
        total_memory=gpu.memory,
        multi_processor_count=128,
        is_integrated=0,
    )
    cuda: Any = torch.cuda
    cuda.Stream = cuda.Event = SimpleNamespace
    cuda.current_device = lambda: 0
    cuda.get_device_properties = lambda *_: properties
    cuda.get_device_capability = lambda *_: gpu.capability
    cuda.get_device_name = lambda *_: properties.name
