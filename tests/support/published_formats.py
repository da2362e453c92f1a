# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Quantised checkpoints as they are published: their configurations, and by hand the
bytes that an expert takes on a GPU."""

QWEN = 3 * 2048 * 768
"""Weights of an expert of Qwen3-30B-A3B."""

PADDED = 3 * 2944 * 3072
"""Of gpt-oss-20b, whose 2880 are padded for Marlin."""

BYTES = {
    "fp8": QWEN + 4 * QWEN // 128**2,
    # Without FP8 in hardware: Marlin, which takes 16 bits for a scale, in every row.
    "fp8 on an A100": QWEN + 2 * QWEN // 128,
    "auto_gptq": QWEN // 2 + 2 * QWEN // 128 + QWEN // 128 // 2,
    "auto_awq": QWEN // 2 + 2 * QWEN // 128 + QWEN // 128 // 2,
    "compressed-tensors": QWEN // 2 + 2 * QWEN // 128,
    "modelopt_fp4": QWEN // 2 + QWEN // 16 + 2 * 4,
    "gpt_oss_mxfp4": PADDED // 2 + PADDED // 32 + 2 * (2 * 2944 + 3072),
}
"""Of an expert in each format, as vLLM has processed it. Weights, scales, zero points
(those of GPTQ are kept, though a symmetric format reads none), biases."""

_W4 = {"num_bits": 4, "type": "int", "symmetric": True, "dynamic": False}
_FP4 = {"num_bits": 4, "type": "float", "group_size": 16, "dynamic": False}
_A8 = {"dtype": "int8", "qscheme": "per_tensor", "is_dynamic": False}

QUANTISED = {
    "fp8": {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    },
    "auto_awq": {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
    },
    "auto_gptq": {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "desc_act": False,
        "sym": True,
    },
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**_W4, "strategy": "group", "group_size": 128},
            }
        },
    },
    "modelopt_fp4": {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "ignore": ["lm_head", "model.layers.*.mlp.gate"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": _FP4,
                "input_activations": _FP4,
            }
        },
    },
    "gpt_oss_mxfp4": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
}
"""As published."""

QUARK_STATIC = {
    "quant_method": "quark",
    "export": {"kv_cache_group": [], "pack_method": "reorder"},
    "global_quant_config": {
        "weight": {**_A8, "symmetric": True},
        "input_tensors": {**_A8, "symmetric": True},
    },
    "exclude": ["lm_head"],
    "layer_quant_config": {},
    "layer_type_quant_config": {},
}
