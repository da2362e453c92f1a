# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which experts class vLLM chooses for a format on a GPU, in a process that sees GPUs
which are elsewhere: `python -m tests.support.kernel_choice` prints JSON.

FlashInfer, DeepGEMM and Humming are not installed here, so vLLM finds that their
kernels do not run. `able` makes a class say that it supports everything, as on a
machine with the library.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from enum import EnumType
from types import SimpleNamespace
from typing import Any

from vllm.plugins.moe_gpu_prefetch.command import gpu_elsewhere
from vllm.plugins.moe_gpu_prefetch.command.gpu_elsewhere import Gpu

CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
BACKENDS = (
    "cutlass",
    "flashinfer_cutlass",
    "flashinfer_trtllm",
    "deep_gemm",
    "humming",
)


@contextmanager
def gpu_of(capability: tuple[int, int]) -> Iterator[None]:
    """After `pretend`: the same with another capability."""
    from vllm.platforms import current_platform
    from vllm.platforms.interface import DeviceCapability

    from vllm.model_executor.layers.fused_moe.expert_slots.replacing import replaced

    answer = classmethod(lambda cls, *_, **__: DeviceCapability(*capability))
    with replaced(type(current_platform), "get_device_capability", answer):
        yield


@contextmanager
def able(classes: list[type]) -> Iterator[None]:
    """Within, these classes of vLLM's support every layer and every device."""
    from vllm.model_executor.layers.fused_moe.expert_slots.replacing import replaced

    yes = staticmethod(lambda *_, **__: True)
    with ExitStack() as stack:
        for cls in classes:
            for name in dir(cls):
                if name.startswith("_supports_"):
                    stack.enter_context(replaced(cls, name, yes))
        yield


def moe_config(backend: str = "auto") -> Any:
    import torch
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    from vllm.model_executor.layers.fused_moe import config

    return config.FusedMoEConfig(
        num_experts=16,
        experts_per_token=2,
        hidden_dim=256,
        intermediate_size=256,
        num_local_experts=16,
        num_logical_experts=16,
        activation=MoEActivation.SILU,
        device="cpu",
        routing_method=config.RoutingMethodType.Renormalize,
        moe_parallel_config=config.FusedMoEParallelConfig.make_no_parallel(),
        in_dtype=torch.bfloat16,
        moe_backend=backend,
    )


def formats() -> dict[str, tuple[Any, Callable[[Any], tuple[Any, type]]]]:
    """By name: the module that chooses, and its choice for a layer's configuration."""
    from compressed_tensors.quantization import QuantizationArgs
    from vllm.model_executor.layers.fused_moe.oracle import (
        fp8,
        int8,
        int_wna16,
        mxfp4,
        nvfp4,
    )
    from vllm.model_executor.layers.quantization.utils import quant_utils as keys

    four = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=128)

    def of_fp8(weights: Any, activations: Any) -> tuple[Any, Any]:
        return fp8, lambda config: fp8.select_fp8_moe_backend(
            config, weights, activations, allow_vllm_cutlass=True
        )

    return {
        "fp8-block": of_fp8(keys.kFp8Static128BlockSym, keys.kFp8Dynamic128Sym),
        "fp8-channel": of_fp8(keys.kFp8StaticChannelSym, keys.kFp8DynamicTokenSym),
        "fp8-static": of_fp8(keys.kFp8StaticTensorSym, keys.kFp8StaticTensorSym),
        "int8": (int8, int8.select_int8_moe_backend),
        "int4": (
            int_wna16,
            lambda config: int_wna16.select_wna16_moe_backend(
                config, keys.kInt4Static, four, may_have_zp=False, may_have_bias=False
            ),
        ),
        "mxfp4": (mxfp4, mxfp4.select_mxfp4_moe_backend),
        "nvfp4": (
            nvfp4,
            lambda config: nvfp4.select_nvfp4_moe_backend(
                config, keys.kNvfp4Static, keys.kNvfp4Dynamic
            ),
        ),
    }


def asked(choose: Callable[[Any], tuple[Any, type]], backend: str = "auto") -> str:
    """The name of the class, or what is raised."""
    from vllm.model_executor.layers.fused_moe.expert_slots.cuda.kernels import (
        choosing_among_served,
    )

    config = moe_config(backend)
    try:
        with choosing_among_served(config):
            return choose(config)[1].__name__
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _classes(oracle: Any, backend: str) -> list[type]:
    """Those that `--moe-backend` names; none if the format has no such backend."""
    (map_backend,) = (
        getattr(oracle, name) for name in vars(oracle) if name.startswith("map_")
    )
    try:
        found = map_backend(backend)
    except ValueError:
        return []
    found = found if isinstance(found, list) else [found]
    return [cls for one in found for cls in oracle.backend_to_kernel_cls(one)]


def _others(oracle: Any) -> list[type]:
    """All that vLLM has for a format and slots do not serve."""
    from vllm.model_executor.layers.fused_moe.expert_slots.cuda.kernels import SERVED

    (backends,) = (
        value
        for value in vars(oracle).values()
        if isinstance(value, EnumType) and value.__module__ == oracle.__name__
    )
    found = set()
    for backend in backends:
        with suppress(ImportError, ValueError):  # of another platform, or of none
            found.update(oracle.backend_to_kernel_cls(backend))
    return [cls for cls in found if cls.__name__ not in SERVED]


def main() -> None:
    from vllm.config import VllmConfig, set_current_vllm_config

    chosen: dict[str, dict[str, str]] = {}
    explicit: dict[str, dict[str, Any]] = {}
    config = VllmConfig()
    model: Any = SimpleNamespace(
        quantization_config=None, hf_text_config=SimpleNamespace(model_type="qwen3_moe")
    )
    config.model_config = model
    with set_current_vllm_config(config):
        for name, (oracle, choose) in formats().items():
            chosen[name], explicit[name] = {}, {}
            for capability in CAPABILITIES:
                with gpu_of(capability):
                    plain = asked(choose)
                    with able(_others(oracle)):
                        assert asked(choose) == plain, (name, capability)
                chosen[name][".".join(map(str, capability))] = plain
            with gpu_of((9, 0)):
                for way in ("triton", "marlin"):
                    explicit[name][way] = asked(choose, way)
                for backend in BACKENDS:
                    classes = _classes(oracle, backend)
                    missing = asked(choose, backend)
                    with able(classes):
                        there = asked(choose, backend)
                    names = [cls.__name__ for cls in classes]
                    explicit[name][backend] = [names, there, missing]
    json.dump({"chosen": chosen, "explicit": explicit}, sys.stdout)


if __name__ == "__main__":
    gpu_elsewhere.pretend(Gpu("RTX 4090", (8, 9), 24 << 30))
    main()
