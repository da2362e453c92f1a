# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a row of the matrix says, and the parts of configurations that rows share."""

from dataclasses import dataclass, field
from typing import Any

EXPERTS = 16
TOP_K = 2


@dataclass(frozen=True, eq=False)
class Architecture:
    """One row of the matrix.

    Attributes:
        model_class: transformers' class that writes the checkpoint. None: transformers
            has none, and vLLM makes the weights.
        config_class: its configuration's class, or None.
        config: what differs from `COMMON`.
        top_k: the router's.
        engine: engine arguments that this architecture needs.
        published: the architecture's name in published checkpoints, where transformers'
            differs.
        left_out: a pattern of tensor names that published checkpoints do not have.
        transposed: a pattern of tensor names that published checkpoints hold as
            [experts, in, out], and transformers does not.
        stock_error: what stock vLLM says of it on the CPU platform, where it cannot run
            it.
    """

    model_class: str | None
    config_class: str | None
    config: dict[str, Any]
    top_k: int = TOP_K
    engine: dict[str, Any] = field(default_factory=dict)
    published: str | None = None
    left_out: str | None = None
    transposed: str | None = None
    stock_error: str | None = None

    @property
    def name(self) -> str:
        name = self.published or self.model_class
        assert name
        return name

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
HEADS = {"head_dim": 32}
CHOSEN = {"num_experts_per_tok": TOP_K}
NUMBERED = {"num_experts": EXPERTS, **CHOSEN}
LOCAL = {"num_local_experts": EXPERTS, **CHOSEN}
ROUTED = {"n_routed_experts": EXPERTS, **CHOSEN}
WIDTH = {"moe_intermediate_size": 64}
SHARED_EXPERT = {"shared_expert_intermediate_size": 64}
FIRST_DENSE = {"first_k_dense_replace": 1, "num_hidden_layers": 3}
GROUPS = {"n_group": 4, "topk_group": 2}
LATENT_ATTENTION = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
}
LINEAR_ATTENTION = {
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}


def causal(name: str, *parts: dict[str, Any], **config: Any) -> Architecture:
    """An architecture whose classes are NAMEConfig and NAMEForCausalLM."""
    special = {
        key: config.pop(key) for key in ("left_out", "stock_error") if key in config
    }
    for part in reversed(parts):
        config = part | config
    return Architecture(f"{name}ForCausalLM", f"{name}Config", config, **special)


def described(
    name: str,
    *parts: dict[str, Any],
    stock_error: str | None = None,
    engine: dict[str, Any] | None = None,
    **config: Any,
) -> Architecture:
    """The architecture NAMEForCausalLM, which transformers cannot write a checkpoint
    of: a configuration as published, and the weights that vLLM makes with
    `--load-format dummy`."""
    for part in reversed(parts):
        config = part | config
    common = {"torch_dtype": "bfloat16", "rms_norm_eps": 1e-6, "hidden_act": "silu"}
    return Architecture(
        None,
        None,
        common | config,
        engine={"load_format": "dummy", **(engine or {})},
        published=f"{name}ForCausalLM",
        stock_error=stock_error,
    )
