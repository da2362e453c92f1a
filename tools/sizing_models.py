# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The models of docs/sizing.md: published configurations, in bfloat16 and as quantised
checkpoints have them. Where a checkpoint lists layers that are not quantised one by
one, a pattern names them here."""

from collections.abc import Callable

from transformers import (
    DeepseekV3Config,
    Gemma4TextConfig,
    Glm4MoeConfig,
    GptOssConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
)

from tests.support.published_formats import QUANTISED

_INT4_EXPERTS = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "ignore": [
        "lm_head",
        "re:.*self_attn.*",
        "re:.*shared_experts.*",
        r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
    ],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                **{"num_bits": 4, "type": "int", "symmetric": True, "dynamic": False},
                **{"strategy": "group", "group_size": 32},
            },
        }
    },
}
_FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
_FP8_CHANNELS = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head", "re:.*mlp.gate$"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**_FLOAT8, "strategy": "channel", "dynamic": False},
            "input_activations": {**_FLOAT8, "strategy": "token", "dynamic": True},
        }
    },
}


def _qwen3_moe(
    hidden: int, layers: int, heads: int, width: int, expert_width: int
) -> PretrainedConfig:
    return Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"],
        vocab_size=151936,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=4,
        head_dim=128,
        intermediate_size=width,
        moe_intermediate_size=expert_width,
        num_experts=128,
        num_experts_per_tok=8,
        max_position_embeddings=40960,
        tie_word_embeddings=False,
    )


def _qwen3_30b_a3b() -> PretrainedConfig:
    return _qwen3_moe(2048, layers=48, heads=32, width=6144, expert_width=768)


def _qwen3_235b_a22b() -> PretrainedConfig:
    return _qwen3_moe(4096, layers=94, heads=64, width=12288, expert_width=1536)


def _gemma_4_26b_a4b() -> PretrainedConfig:
    """The text model."""
    return Gemma4TextConfig(
        architectures=["Gemma4ForCausalLM"],
        vocab_size=262144,
        hidden_size=2816,
        intermediate_size=2112,
        num_hidden_layers=30,
        layer_types=[*["sliding_attention"] * 5, "full_attention"] * 5,
        sliding_window=1024,
        num_attention_heads=16,
        num_key_value_heads=8,
        num_global_key_value_heads=2,
        head_dim=256,
        global_head_dim=512,
        attention_k_eq_v=True,
        hidden_size_per_layer_input=0,
        enable_moe_block=True,
        num_experts=128,
        top_k_experts=8,
        moe_intermediate_size=704,
        max_position_embeddings=262144,
    )


def _gpt_oss(layers: int, experts: int) -> PretrainedConfig:
    return GptOssConfig(
        architectures=["GptOssForCausalLM"],
        vocab_size=201088,
        hidden_size=2880,
        intermediate_size=2880,
        num_hidden_layers=layers,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=64,
        num_local_experts=experts,
        num_experts_per_tok=4,
        sliding_window=128,
        max_position_embeddings=131072,
    )


def _glm_4_5_air() -> PretrainedConfig:
    return Glm4MoeConfig(
        architectures=["Glm4MoeForCausalLM"],
        vocab_size=151552,
        hidden_size=4096,
        intermediate_size=10944,
        num_hidden_layers=46,
        num_attention_heads=96,
        num_key_value_heads=8,
        head_dim=128,
        attention_bias=True,
        moe_intermediate_size=1408,
        n_routed_experts=128,
        n_shared_experts=1,
        num_experts_per_tok=8,
        first_k_dense_replace=1,
        max_position_embeddings=131072,
    )


def _mixtral_8x7b() -> PretrainedConfig:
    return MixtralConfig(
        architectures=["MixtralForCausalLM"],
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=32768,
    )


def _deepseek(
    vocabulary: int,
    heads: int,
    experts: int,
    groups: int,
    groups_used: int,
    dense_layers: int,
    positions: int,
) -> PretrainedConfig:
    return DeepseekV3Config(
        architectures=["DeepseekV3ForCausalLM"],
        vocab_size=vocabulary,
        hidden_size=7168,
        intermediate_size=18432,
        moe_intermediate_size=2048,
        num_hidden_layers=61,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        q_lora_rank=1536,
        kv_lora_rank=512,
        n_routed_experts=experts,
        n_shared_experts=1,
        num_experts_per_tok=8,
        n_group=groups,
        topk_group=groups_used,
        first_k_dense_replace=dense_layers,
        scoring_func="sigmoid",
        topk_method="noaux_tc",
        max_position_embeddings=positions,
    )


def _deepseek_v3() -> PretrainedConfig:
    return _deepseek(129280, 128, 256, 8, 4, dense_layers=3, positions=163840)


def _kimi_k2_thinking() -> PretrainedConfig:
    return _deepseek(163840, 64, 384, 1, 1, dense_layers=1, positions=262144)


def _quantised(
    config: PretrainedConfig, form: dict, *unquantised: str
) -> PretrainedConfig:
    """With the format's own list of what is not quantised, or with this one."""
    if unquantised:
        form = form | {"modules_to_not_convert": list(unquantised)}
    config.quantization_config = form
    return config


MODELS: dict[str, Callable[[], PretrainedConfig]] = {
    "Qwen3-30B-A3B": _qwen3_30b_a3b,
    "gemma-4-26B-A4B": _gemma_4_26b_a4b,
    "gpt-oss-20b": lambda: _gpt_oss(layers=24, experts=32),
    "Mixtral-8x7B": _mixtral_8x7b,
}
"""In bfloat16. gpt-oss is published in MXFP4."""

QUANTISED_MODELS: dict[str, Callable[[], PretrainedConfig]] = {
    "gpt-oss-20b, MXFP4": lambda: _quantised(
        _gpt_oss(layers=24, experts=32), QUANTISED["gpt_oss_mxfp4"]
    ),
    "Qwen3-30B-A3B, INT4 (GPTQ)": lambda: _quantised(
        _qwen3_30b_a3b(), QUANTISED["auto_gptq"]
    ),
    "Qwen3-30B-A3B, FP8 (blocks)": lambda: _quantised(
        _qwen3_30b_a3b(),
        QUANTISED["fp8"],
        "lm_head",
        *(f"model.layers.{layer}.mlp.gate" for layer in range(48)),
    ),
    "GLM-4.5-Air, FP8 (channels)": lambda: _quantised(_glm_4_5_air(), _FP8_CHANNELS),
    "gpt-oss-120b, MXFP4": lambda: _quantised(
        _gpt_oss(layers=36, experts=128), QUANTISED["gpt_oss_mxfp4"]
    ),
    "Qwen3-235B-A22B, INT4 (GPTQ)": lambda: _quantised(
        _qwen3_235b_a22b(), QUANTISED["auto_gptq"]
    ),
}
"""The smallest experts first."""

LARGE_MODELS: dict[str, Callable[[], PretrainedConfig]] = {
    "DeepSeek-V3, INT4 (AWQ)": lambda: _quantised(
        _deepseek_v3(), QUANTISED["auto_awq"], "lm_head"
    ),
    "DeepSeek-V3, FP8 (blocks)": lambda: _quantised(
        _deepseek_v3(), QUANTISED["fp8"], "lm_head"
    ),
    "Kimi-K2-Thinking, INT4": lambda: _quantised(_kimi_k2_thinking(), _INT4_EXPERTS),
}


def config_of(name: str) -> PretrainedConfig:
    """Of a model in one of the lists."""
    config = (MODELS | QUANTISED_MODELS | LARGE_MODELS)[name]()
    config.dtype = "bfloat16"
    return config
