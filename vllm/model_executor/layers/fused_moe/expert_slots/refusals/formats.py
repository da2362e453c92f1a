# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Formats of experts that slots do not serve: each by name, with the reason and the way
out. Which kernels slots serve is the platform's table (`Backend.objection`); no kernel
is in both."""

from typing import Any

from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)

from vllm import envs
from vllm.model_executor.layers.fused_moe.expert_slots.refusals import reasons
from vllm.model_executor.layers.fused_moe.expert_slots.versions import VLLM_0_33

FORMATS = {
    "bitsandbytes": "its method unpacks all experts of a layer in every step",
    "gguf": "its method reads the experts by expert id, past vLLM's fused-MoE kernels",
}
"""Names of quantisations whose methods run no fused-MoE kernel of vLLM's, and why slots
cannot serve them."""

_NOT_SHOWN = "no test shows it to be exact on rows in another order"
_BY_ID = "it reads layouts and factors of a whole layer, which are not made of rows"

KERNELS = {
    "Batched": (
        "it sorts tokens by expert before it runs, for ranks that exchange them",
        reasons.OTHER_BACKEND,
    ),
    "Cutlass": (_NOT_SHOWN, reasons.OTHER_CHECKPOINT),
    "DeepGemm": (_NOT_SHOWN, reasons.OTHER_BACKEND),
    "FlashInfer": (
        "its tuning makes stock differ from itself between two starts",
        reasons.OTHER_BACKEND,
    ),
    "Humming": (
        "it packs weights for a layout of its own, which no test shows to be exact in "
        "rows",
        reasons.OTHER_CHECKPOINT,
    ),
    "OAITriton": (
        "it keeps the weights in objects of triton_kernels, not in parameters",
        reasons.OTHER_BACKEND,
    ),
    "TrtLlm": (_BY_ID, reasons.OTHER_BACKEND),
}
"""Parts of the names of stock's kernels; why slots cannot serve them, and the way
out."""

TESTED = {
    "AutoAWQMoEMethod",
    "AutoGPTQMoEMethod",
    "CompressedTensorsW4A4Mxfp4MoEMethod",
    "CompressedTensorsW4A4Nvfp4MoEMethod",
    "CompressedTensorsW8A8Fp8MoEMethod",
    "CompressedTensorsW8A8Int8MoEMethod",
    "CompressedTensorsW8A8Mxfp8MoEMethod",
    "CompressedTensorsWNA16MoEMethod",
    "Fp8MoEMethod",
    "GptOssMxfp4MoEMethod",
    "INCMxfp4MoEMethod",
    "INCMxfp8MoEMethod",
    "ModelOptFp8MoEMethod",
    "ModelOptMxFp8FusedMoE",
    "ModelOptNvFp4FusedMoE",
    "MoeWNA16Method",
    "Mxfp4MoEMethod",
    "QuarkOCP_MX_MoEMethod",
    "QuarkW4A16Int4MoEMethod",
    "QuarkW8A8Fp8MoEMethod",
    "QuarkW8A8Int8MoEMethod",
}
"""Stock's methods whose processing is tested: slots and shared stores follow all that
they make of the experts (tests/quantised)."""

_STOCKS_METHODS = "vllm.model_executor.layers.quantization."


def kernel_reason(name: str) -> tuple[str, str] | None:
    """Why slots cannot serve a kernel of stock's, and the way out; None if it is not
    known here.

    Args:
        name: of the experts class.
    """
    return next((words for part, words in KERNELS.items() if part in name), None)


def format_objection(layer: Any) -> str | None:
    """Why the format of a layer that stock has built cannot have slots, with the way
    out; or None, which leaves the answer to the platform."""
    method = layer.quant_method
    if type(method) is UnquantizedFusedMoEMethod:
        return None
    name = layer.quant_config.get_name() if layer.quant_config else "none"
    if reason := FORMATS.get(name):
        return f"quantisation {name}: {reason}. {reasons.OTHER_CHECKPOINT}"
    return (
        _of_method(method, name)
        or _owner_objection(type(method))
        or _of_kernel(getattr(method, "experts_cls", None))
        or _untested(type(method).__name__, name)
    )


def _untested(method: str, name: str) -> str | None:
    if method in TESTED:
        return None
    return (
        f"quantisation {name}: no test shows that slots follow what {method} makes of "
        f"the experts. {reasons.OTHER_CHECKPOINT}"
    )


def _of_method(method: Any, name: str) -> str | None:
    """What is known of stock's methods whose kernel slots serve elsewhere, or that have
    none."""
    cls = type(method).__name__
    if getattr(method, "uses_meta_device", False):
        return (
            f"quantisation {name} ({cls}) quantises while it loads: the experts are on "
            "no device before, so they cannot be read into host memory. Quantise the "
            "checkpoint offline, for example with llm-compressor, and serve that"
        )
    if cls == "HummingMoEMethod":
        return (
            f"quantisation {name} runs it with Humming, as vLLM does for 2, 3, 5, 6 "
            f"and 7 bits: {KERNELS['Humming'][0]}. {reasons.OTHER_CHECKPOINT}"
        )
    if cls == "CompressedTensorsW4A8Int8MoEMethod":
        return (
            "4-bit weights with 8-bit activations (W4A8 INT8): the kernel routes "
            f"tokens itself. {reasons.OTHER_CHECKPOINT}"
        )
    if cls == "QuarkW8A8Int8MoEMethod" and method.static_input_scales:
        return (
            "Quark INT8 with static activation scales runs past vLLM's fused-MoE "
            f"kernels. {reasons.CHANNEL_SCALES}"
        )
    if (
        cls == "QuarkW8A8Int8MoEMethod"
        and method.weight_qscheme == "per_tensor"
        and not VLLM_0_33
    ):
        return (
            "Quark INT8 with one scale for each expert: the kernel of this vLLM takes "
            f"the scale of row 0 for all of them. Use vLLM 0.33, or: "
            f"{reasons.CHANNEL_SCALES}"
        )
    return None


def _owner_objection(method: type) -> str | None:
    """Why a method that is not one of stock's own cannot be followed, or None."""
    if method.__module__.startswith(_STOCKS_METHODS):
        return None
    owner = "a model" if method.__module__.startswith("vllm.") else "another plugin"
    return (
        f"its method {method.__module__}.{method.__qualname__} belongs to {owner}: "
        "it may read weights by expert id"
    )


def _of_kernel(experts_cls: Any) -> str | None:
    if experts_cls is None:
        return None
    name = experts_cls.__name__
    if known := kernel_reason(name):
        reason, way_out = known
        return f"its kernel is {name}: {reason}. {way_out}"
    if experts_cls.is_monolithic():
        return (
            f"its kernel is {name}: it routes tokens itself. {reasons.OTHER_CHECKPOINT}"
        )
    dtype = envs.VLLM_MARLIN_INPUT_DTYPE
    if name == "MarlinExperts" and dtype:
        return (
            f"VLLM_MARLIN_INPUT_DTYPE={dtype} with Marlin: no test shows 8-bit "
            "activations to be exact there. Unset it"
        )
    return None
