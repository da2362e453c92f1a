# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The same as `test_rows` for the rest of vLLM's methods that slots serve: those with
checkpoints of another kind, with Triton kernels, and with groups of other sizes.

Each cell is named by the class of its method and by what is special about it.
"""

from typing import Any

import pytest
import torch
from vllm.model_executor.layers.fused_moe.experts.nvfp4_emulation_moe import (
    Nvfp4QuantizationEmulationTritonExperts,
)
from vllm.model_executor.layers.fused_moe.experts.triton_moe import (
    TritonExperts,
    TritonWNA16Experts,
)
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability

from tests.quantised.test_rows import (
    AWQ,
    FLOAT4,
    FLOAT8,
    FORMATS,
    FP8_CONFIG,
    GPTQ,
    GPTQ_PARTS,
    INT4,
    NVFP4,
    PACKED,
    PLAIN,
    check,
    compressed,
    modelopt,
    names,
    without_a_gpu,
)
from tests.support.processed_layers import Format, building, built
from vllm.model_executor.layers.fused_moe.expert_slots.refusals import formats

__all__ = ["without_a_gpu"]

TRITON: Any = {"backend": "triton", "kernel": "TritonExperts"}
WNA16: Any = {"backend": "triton", "kernel": "TritonWNA16Experts"}
EMULATION: Any = {
    "backend": "emulation",
    "kernel": "Nvfp4QuantizationEmulationTritonExperts",
}
STATIC: Any = {"wide": ("input_scale",)}
NO_ZEROS: Any = {"unread": ("qzeros",)}
GPTQ_SYM = GPTQ | {"sym": True, "quant_method": "gptq"}
NVFP4_WEIGHTS = FLOAT4 | {"strategy": "tensor_group", "group_size": 16}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
TOKENS = {"strategy": "token", "dynamic": True}

QUARK_TENSOR = {
    "dtype": "fp8_e4m3",
    "qscheme": "per_tensor",
    "symmetric": True,
    "is_dynamic": False,
}


def methods() -> set[str]:
    """The classes of all methods that have a cell, here or in `test_rows`."""
    found = {name.partition(",")[0] for name in METHODS}
    for form in FORMATS.values():
        with building(form), torch.device("meta"):
            found.add(type(built(form, 2).quant_method).__name__)
    return found


def nvfp4_ct(inputs: bool, **more: Any) -> Format:
    dynamic = NVFP4_WEIGHTS | {"dynamic": "local"}
    config = compressed(
        "nvfp4-pack-quantized", dynamic if inputs else None, **NVFP4_WEIGHTS
    )
    more = {"dtype": torch.float16} | more
    return Format(*config, (*PLAIN, "weight_scale_2"), **more)


def fp8_ct(inputs: dict[str, Any], **weights: Any) -> tuple[str, dict[str, Any]]:
    return compressed("float-quantized", FLOAT8 | inputs, **FLOAT8, **weights)


def int4_ct(**weights: Any) -> tuple[str, dict[str, Any]]:
    return compressed("pack-quantized", **(INT4 | {"symmetric": True} | weights))


def gptq(**more: Any) -> Format:
    return Format("auto_gptq", GPTQ | {"sym": True} | more, GPTQ_PARTS, **NO_ZEROS)


def quark(
    weights: dict[str, Any], inputs: dict[str, Any] | None
) -> tuple[str, dict[str, Any]]:
    config = {"weight": weights, "input_tensors": inputs}
    config |= {"output_tensors": None, "bias": None}
    return "quark", {
        "quant_method": "quark",
        "export": {"kv_cache_group": [], "pack_method": "reorder"},
        "global_quant_config": config,
        "layer_quant_config": {},
        "layer_type_quant_config": {},
        "exclude": [],
    }


def quark_channel(dtype: str) -> tuple[str, dict[str, Any]]:
    channel = {"dtype": dtype, "qscheme": "per_channel", "symmetric": True}
    return quark(
        channel | {"is_dynamic": False, "ch_axis": 0},
        channel | {"is_dynamic": True, "ch_axis": 1},
    )


METHODS = {
    "CompressedTensorsW4A4Nvfp4MoEMethod": nvfp4_ct(True),
    "CompressedTensorsW4A4Nvfp4MoEMethod, W4A16": nvfp4_ct(False),
    "CompressedTensorsW4A4Nvfp4MoEMethod, emulation": nvfp4_ct(
        True, wide=("quant_method.moe_quant_config._a{}.alpha_or_gscale",), **EMULATION
    ),
    "ModelOptNvFp4FusedMoE, emulation": Format(
        *NVFP4, dtype=torch.float16, **EMULATION, **STATIC
    ),
    "ModelOptFp8MoEMethod": Format("modelopt", modelopt("FP8"), PLAIN, **STATIC),
    "ModelOptFp8MoEMethod, Triton": Format(
        "modelopt", modelopt("FP8"), PLAIN, **STATIC, **TRITON
    ),
    "MoeWNA16Method, GPTQ": Format(
        "moe_wna16", GPTQ_SYM, ("qweight", "scales"), **WNA16
    ),
    "MoeWNA16Method, GPTQ with zero points": Format(
        "moe_wna16", GPTQ_SYM | {"sym": False}, GPTQ_PARTS, **WNA16
    ),
    "MoeWNA16Method, GPTQ of 8 bits": Format(
        "moe_wna16", GPTQ_SYM | {"bits": 8}, ("qweight", "scales"), **WNA16
    ),
    "MoeWNA16Method, AWQ": Format(
        "moe_wna16", AWQ | {"quant_method": "awq"}, GPTQ_PARTS, **WNA16
    ),
    "Mxfp4MoEMethod": Format("mxfp4", {}, PLAIN),
    "CompressedTensorsW8A8Mxfp8MoEMethod": Format(
        *compressed(
            "mxfp8-quantized",
            **FLOAT8,
            strategy="group",
            group_size=32,
            scale_dtype="torch.uint8",
        ),
        PLAIN,
    ),
    "CompressedTensorsW8A8Int8MoEMethod, Triton": Format(
        *compressed("int-quantized", INT8 | TOKENS, **INT8, strategy="channel"),
        PLAIN,
        **TRITON,
    ),
    "CompressedTensorsW8A8Fp8MoEMethod, channels, Triton": Format(
        *fp8_ct(TOKENS, strategy="channel"), PLAIN, **TRITON
    ),
    "CompressedTensorsW8A8Fp8MoEMethod, static, Triton": Format(
        *fp8_ct({"strategy": "tensor"}, strategy="tensor"), PLAIN, **STATIC, **TRITON
    ),
    "CompressedTensorsW8A8Fp8MoEMethod, blocks, Triton": Format(
        *fp8_ct(
            {"strategy": "group", "group_size": 128, "dynamic": True},
            strategy="block",
            block_structure=[128, 128],
        ),
        PLAIN,
        **TRITON,
    ),
    "Fp8MoEMethod, blocks, Triton": Format(
        "fp8",
        FP8_CONFIG | {"weight_block_size": [128, 128]},
        ("weight", "weight_scale_inv"),
        **TRITON,
    ),
    "Fp8MoEMethod, static, Triton": Format(
        "fp8", FP8_CONFIG | {"activation_scheme": "static"}, PLAIN, **STATIC, **TRITON
    ),
    "Fp8MoEMethod, dynamic, Triton": Format("fp8", FP8_CONFIG, PLAIN, **TRITON),
    "CompressedTensorsWNA16MoEMethod, Triton": Format(*int4_ct(), PACKED, **WNA16),
    "CompressedTensorsWNA16MoEMethod, zero points, Triton": Format(
        *int4_ct(symmetric=False), (*PACKED, "weight_zero_point"), **WNA16
    ),
    "CompressedTensorsWNA16MoEMethod, groups of 32": Format(
        *int4_ct(group_size=32), PACKED
    ),
    "CompressedTensorsWNA16MoEMethod, channels": Format(
        *int4_ct(strategy="channel", group_size=None), PACKED
    ),
    "AutoGPTQMoEMethod, channels": gptq(group_size=-1),
    "AutoGPTQMoEMethod, channels, desc_act": gptq(group_size=-1, desc_act=True),
    "AutoGPTQMoEMethod, groups of 32": gptq(group_size=32),
    "AutoGPTQMoEMethod, groups of 64": gptq(group_size=64),
    "AutoGPTQMoEMethod, 8 bits": gptq(bits=8),
    "AutoAWQMoEMethod, groups of 32": Format(
        "auto_awq", AWQ | {"group_size": 32}, GPTQ_PARTS, dtype=torch.float16
    ),
    "QuarkW8A8Fp8MoEMethod": Format(*quark_channel("fp8_e4m3"), PLAIN),
    "QuarkW8A8Fp8MoEMethod, Triton": Format(
        *quark_channel("fp8_e4m3"), PLAIN, **TRITON
    ),
    "QuarkW8A8Fp8MoEMethod, static, Triton": Format(
        *quark(QUARK_TENSOR, QUARK_TENSOR), PLAIN, **STATIC, **TRITON
    ),
    "QuarkW8A8Int8MoEMethod, Triton": Format(*quark_channel("int8"), PLAIN, **TRITON),
    "QuarkW4A16Int4MoEMethod": Format(
        *quark(
            {
                "dtype": "int4",
                "qscheme": "per_group",
                "group_size": 128,
                "symmetric": True,
                "ch_axis": 1,
            },
            None,
        ),
        (*PLAIN, "weight_zero_point"),
        unread=("weight_zero_point",),
        **WNA16,
    ),
    "QuarkOCP_MX_MoEMethod": Format(
        *quark(
            {
                "dtype": "fp4",
                "qscheme": "per_group",
                "group_size": 32,
                "scale_format": "e8m0",
                "is_dynamic": False,
            },
            None,
        ),
        PLAIN,
    ),
    "INCMxfp4MoEMethod": Format(
        "inc",
        {
            "bits": 4,
            "group_size": 32,
            "data_type": "mx_fp",
            "packing_format": "auto_round:llm_compressor",
            "quant_method": "auto-round",
        },
        PLAIN,
    ),
    "INCMxfp8MoEMethod": Format(
        "inc",
        {
            "bits": 8,
            "group_size": 32,
            "data_type": "mx_fp",
            "packing_format": "auto_round:llm_compressor",
            "quant_method": "auto-round",
        },
        PLAIN,
    ),
}


@pytest.fixture(autouse=True)
def triton_runs(monkeypatch):
    for cls in (
        TritonExperts,
        TritonWNA16Experts,
        Nvfp4QuantizationEmulationTritonExperts,
    ):
        monkeypatch.setattr(cls, "_supports_current_device", lambda: True)
    monkeypatch.setattr(TritonExperts, "_supports_quant_scheme", lambda *_: True)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    capability = classmethod(lambda *_, **__: DeviceCapability(8, 6))
    monkeypatch.setattr(type(current_platform), "get_device_capability", capability)


@pytest.mark.parametrize("name", METHODS)
def test_rows_are_made_from_their_expert_alone(name):
    """By the method that is named."""
    check(METHODS[name], set(), name.partition(",")[0])


def test_bfloat16_nvfp4_of_compressed_tensors_depends_on_all_experts():
    """As that of ModelOpt does in `test_rows`."""
    form = nvfp4_ct(True, dtype=torch.bfloat16)
    check(form, names(("weight_scale", "weight_scale_2")))


def test_methods_that_slots_serve_are_those_with_a_cell():
    assert set(formats.TESTED) == methods()


@pytest.mark.parametrize("group_size", (64, 128))
def test_vllm_has_no_order_of_activations_in_groups(group_size):
    """So no GPTQ layer has a g_idx, whose rows a kernel would have to read."""
    form = gptq(group_size=group_size, desc_act=True)
    with building(form), pytest.raises(ValueError, match="desc_act=True"):
        built(form, 2)
