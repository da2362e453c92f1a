# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A small model of every architecture that vLLM serves through its fused-MoE layer and
that transformers can write a checkpoint of: random weights, 16 experts, top-2 unless
said otherwise."""

from dataclasses import dataclass, field
from typing import Any

EXPERTS = 16
TOP_K = 2


@dataclass(frozen=True, eq=False)
class Architecture:
    """One row of the matrix.

    Attributes:
        model_class: transformers' class that writes the checkpoint.
        config_class: its configuration's class.
        config: what differs from `COMMON`.
        top_k: the router's.
        engine: engine arguments that this architecture needs.
        published: the architecture's name in published checkpoints, where transformers'
            differs.
        left_out: a pattern of tensor names that published checkpoints do not have.
        stock_error: what stock vLLM says of it on the CPU platform, where it cannot run
            it.
    """

    model_class: str
    config_class: str
    config: dict[str, Any]
    top_k: int = TOP_K
    engine: dict[str, Any] = field(default_factory=dict)
    published: str | None = None
    left_out: str | None = None
    stock_error: str | None = None

    @property
    def name(self) -> str:
        return self.published or self.model_class

    @property
    def slot_counts(self) -> list[int]:
        """As few as the router allows, a quarter, half, all but one."""
        return sorted({self.top_k, EXPERTS // 4, EXPERTS // 2, EXPERTS - 1})


COMMON = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 2048,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
_HEADS = {"head_dim": 32}
_TOP_K = {"num_experts_per_tok": TOP_K}
_EXPERTS = {"num_experts": EXPERTS, **_TOP_K}
_LOCAL = {"num_local_experts": EXPERTS, **_TOP_K}
_ROUTED = {"n_routed_experts": EXPERTS, **_TOP_K}
_WIDTH = {"moe_intermediate_size": 64}
_SHARED_EXPERT = {"shared_expert_intermediate_size": 64}
_FIRST_DENSE = {"first_k_dense_replace": 1, "num_hidden_layers": 3}
_GROUPS = {"n_group": 4, "topk_group": 2}
_LATENT_ATTENTION = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
}
_LINEAR_ATTENTION = {
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}

_NO_SPARSE_ATTENTION = "Sparse Attention is not supported on CPU"


def _causal(name: str, *parts: dict[str, Any], **config: Any) -> Architecture:
    """An architecture whose classes are NAMEConfig and NAMEForCausalLM."""
    special = {
        key: config.pop(key) for key in ("left_out", "stock_error") if key in config
    }
    for part in reversed(parts):
        config = part | config
    return Architecture(f"{name}ForCausalLM", f"{name}Config", config, **special)


ARCHITECTURES = (
    _causal("Mixtral", _LOCAL),
    _causal("Qwen2Moe", _EXPERTS, _WIDTH, _SHARED_EXPERT),
    _causal("Qwen3Moe", _EXPERTS, _WIDTH, _HEADS, norm_topk_prob=True),
    _causal("Qwen3Next", _EXPERTS, _WIDTH, _HEADS, _SHARED_EXPERT, _LINEAR_ATTENTION),
    _causal("Olmoe", _EXPERTS),
    _causal("FlexOlmo", _EXPERTS),
    _causal(
        "DeepseekV2",
        *(_ROUTED, _WIDTH, _LATENT_ATTENTION, _FIRST_DENSE, _GROUPS),
        topk_method="group_limited_greedy",
        n_shared_experts=1,
    ),
    _causal(
        "DeepseekV3",
        *(_ROUTED, _WIDTH, _LATENT_ATTENTION, _FIRST_DENSE, _GROUPS),
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        n_shared_experts=1,
        num_nextn_predict_layers=0,
    ),
    _causal(
        "AXK1",
        *(_ROUTED, _WIDTH, _LATENT_ATTENTION, _GROUPS),
        first_k_dense_replace=0,
    ),
    _causal(
        "Glm4Moe",
        *(_ROUTED, _WIDTH, _HEADS, _FIRST_DENSE),
        n_shared_experts=1,
        num_nextn_predict_layers=0,
    ),
    _causal(
        "Glm4MoeLite",
        *(_ROUTED, _WIDTH, _LATENT_ATTENTION, _FIRST_DENSE),
        n_shared_experts=1,
        mlp_layer_types=["dense", "sparse", "sparse"],
    ),
    _causal("GraniteMoe", _LOCAL),
    _causal("GraniteMoeShared", _LOCAL, shared_intermediate_size=64),
    _causal("GraniteMoeSWA", _LOCAL, shared_intermediate_size=64),
    _causal(
        "GraniteMoeHybrid",
        _LOCAL,
        shared_intermediate_size=64,
        mamba_n_heads=8,
        mamba_d_head=32,
        mamba_d_state=32,
        mamba_expand=2,
        layer_types=["mamba", "attention"],
    ),
    Architecture(
        "PhimoeForCausalLM",
        "PhimoeConfig",
        {**_LOCAL, "attention_bias": True, "lm_head_bias": True},
        published="PhiMoEForCausalLM",
    ),
    Architecture(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 128,
            **_HEADS,
        },
        top_k=1,
    ),
    Architecture(
        "Gemma4ForCausalLM",
        "Gemma4TextConfig",
        {
            "enable_moe_block": True,
            "num_experts": EXPERTS,
            "top_k_experts": TOP_K,
            **_WIDTH,
            **_HEADS,
            **_SLIDING,
            "global_head_dim": 32,
            "num_global_key_value_heads": 2,
            "hidden_size_per_layer_input": 0,
            "attention_k_eq_v": True,
        },
    ),
    _causal("GptOss", _LOCAL, _HEADS, _SLIDING, intermediate_size=64),
    _causal(
        "Ernie4_5_Moe",
        _WIDTH,
        moe_num_experts=EXPERTS,
        moe_k=TOP_K,
        moe_num_shared_experts=1,
        moe_layer_start_index=1,
        moe_layer_end_index=2,
        num_hidden_layers=3,
    ),
    _causal(
        "MiniMaxM2",
        *(_LOCAL, _HEADS),
        intermediate_size=64,
        rotary_dim=16,
        use_routing_bias=True,
        scoring_func="softmax",  # stock's CPU router has no sigmoid
    ),
    _causal(
        "Lfm2Moe",
        _EXPERTS,
        _WIDTH,
        num_dense_layers=0,
        layer_types=["conv", "full_attention"],
    ),
    _causal(
        "ExaoneMoe",
        *(_EXPERTS, _WIDTH, _HEADS, _FIRST_DENSE),
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        sliding_window=64,
    ),
    _causal(
        "Afmoe",
        *(_EXPERTS, _WIDTH, _HEADS),
        num_dense_layers=1,
        num_hidden_layers=3,
        score_func="sigmoid",
        route_norm=True,
        n_group=1,
        topk_group=1,
    ),
    _causal("Cohere2Moe", _EXPERTS, _HEADS),
    _causal("HunYuanMoEV1", _HEADS, num_experts=EXPERTS, moe_topk=TOP_K),
    _causal(
        "HYV3",
        *(_EXPERTS, _WIDTH, _HEADS, _FIRST_DENSE),
        num_shared_experts=1,
        expert_hidden_dim=64,
        route_norm=True,
        qk_norm=True,
    ),
    _causal("Mellum", _LOCAL, _WIDTH, _HEADS),
    _causal(
        "MiMoV2Flash",
        *(_ROUTED, _WIDTH, _HEADS),
        v_head_dim=32,
        num_hidden_layers=3,
        hybrid_layer_pattern=[0, 1, 1],
        moe_layer_freq=[0, 1, 1],
        layernorm_epsilon=1e-5,
        swa_head_dim=32,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=2,
        sliding_window_size=128,
    ),
    # What stock vLLM 0.32 cannot run on the CPU platform, slots or not.
    _causal(
        "Jamba",
        _EXPERTS,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=1,
        expert_layer_offset=0,
        mamba_d_state=16,
        mamba_dt_rank=8,
        use_mamba_kernels=False,
        stock_error="Dimension out of range",
    ),
    _causal(
        "NemotronH",
        *(_ROUTED, _WIDTH, _HEADS),
        moe_shared_expert_intermediate_size=64,
        ssm_state_size=16,
        mamba_num_heads=8,
        mamba_head_dim=32,
        n_groups=2,
        hybrid_override_pattern="ME*E",
        num_hidden_layers=4,
        stock_error="is_act_and_mul=False is supported only for CUDA, XPU and ROCm",
    ),
    _causal(
        "LongcatFlash",
        _LATENT_ATTENTION,
        n_routed_experts=EXPERTS,
        moe_topk=TOP_K,
        zero_expert_num=4,
        zero_expert_type="identity",
        expert_ffn_hidden_size=64,
        ffn_hidden_size=128,
        num_layers=1,
        mla_scale_q_lora=True,
        mla_scale_kv_lora=True,
        # The experts that compute nothing have no weights.
        left_out=r"\.experts\.1[6-9]\.",
        stock_error="'_moe_C' object has no attribute 'topk_softmax'",
    ),
    _causal(
        "Laguna",
        *(_EXPERTS, _WIDTH, _HEADS, _SHARED_EXPERT),
        num_hidden_layers=3,
        stock_error="_compute_routing: AssertionError",  # its CPU router has no sigmoid
    ),
    _causal(
        "GlmMoeDsa",
        *(_ROUTED, _WIDTH, _LATENT_ATTENTION, _FIRST_DENSE),
        index_topk=64,
        stock_error=_NO_SPARSE_ATTENTION,
    ),
    _causal(
        "DeepseekV32",
        *(_ROUTED, _WIDTH, _LATENT_ATTENTION, _FIRST_DENSE),
        index_topk=64,
        stock_error=_NO_SPARSE_ATTENTION,
    ),
    _causal(
        "HYV4",
        *(_ROUTED, _WIDTH, _LATENT_ATTENTION),
        stock_error="no valid sparse MLA backend is available",
    ),
)
