# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Models of text that vLLM has a class for and transformers has none: a configuration
as published, and the weights that vLLM makes with `--load-format dummy`."""

from tests.support.architectures.model import (
    EXPERTS,
    HEADS,
    NUMBERED,
    ROUTED,
    TOP_K,
    WIDTH,
    described,
)

_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
_LING = {
    **(_ROPE | NUMBERED | WIDTH | HEADS),
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_shared_experts": 1,
    "norm_topk_prob": True,
    "use_bias": False,
    "use_qkv_bias": False,
    "embedding_dropout": 0.0,
    "norm_head": False,
}
_SIGMOID = {
    "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "router_dtype": "fp32",
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
}

DESCRIBED = (
    described("BailingMoe", _LING, model_type="bailing_moe"),
    described(
        "BailingMoeV2",
        *(_LING, _SIGMOID),
        model_type="bailing_moe_v2",
        use_qk_norm=True,
        use_rmsnorm=True,
        partial_rotary_factor=0.5,
    ),
    described(
        "SarvamMoE",
        *(_LING, _SIGMOID),
        model_type="sarvam_moe",
        use_qk_norm=True,
        use_rmsnorm=True,
    ),
    described(
        "MiMoV2",
        *(_ROPE, ROUTED, WIDTH, HEADS),
        model_type="mimo_v2",
        num_hidden_layers=3,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        v_head_dim=32,
        attention_bias=False,
        layernorm_epsilon=1e-5,
        hybrid_layer_pattern=[0, 1, 1],
        moe_layer_freq=[0, 1, 1],
        swa_head_dim=32,
        swa_v_head_dim=32,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=2,
        sliding_window_size=128,
        add_swa_attention_sink_bias=True,
    ),
    described(
        "Step3p5",
        HEADS,
        model_type="step3p5",
        num_hidden_layers=3,
        num_attention_groups=2,
        moe_num_experts=EXPERTS,
        moe_top_k=TOP_K,
        moe_intermediate_size=64,
        share_expert_dim=64,
        moe_layers_enum="1,2",
        moe_router_activation="softmax",  # stock's CPU router has no sigmoid
        moe_router_scaling_factor=2.0,
        use_head_wise_attn_gate=True,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        sliding_window=64,
        use_moe=True,
        use_moe_router_bias=True,
        need_fp32_gate=True,
        norm_expert_weight=True,
        att_impl_type="GQA",
        rope_theta=10000.0,
        max_seq_len=2048,
    ),
)
