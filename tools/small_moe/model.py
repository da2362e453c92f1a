# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The model, its losses and what its routers do."""

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func


@dataclass(frozen=True)
class Size:
    """Dimensions of the model. All are multiples of 32, which vLLM's kernel for MoE
    layers on the CPU asks for."""

    vocabulary: int = 4096
    hidden: int = 128
    layers: int = 4
    experts: int = 64
    top_k: int = 4
    expert_width: int = 32
    heads: int = 4
    length: int = 512
    """Tokens of a sequence, in training and at most."""


def make_model(size: Size, seed: int, end_of_text: list[int]) -> Qwen3MoeForCausalLM:
    """A Qwen3-MoE with random weights in float32."""
    config = Qwen3MoeConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=4 * size.hidden,
        moe_intermediate_size=size.expert_width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads // 2,
        head_dim=32,
        num_experts=size.experts,
        num_experts_per_tok=size.top_k,
        norm_topk_prob=True,
        max_position_embeddings=size.length,
        tie_word_embeddings=True,
        eos_token_id=end_of_text,
        bos_token_id=None,
        pad_token_id=end_of_text[-1],
    )
    torch.manual_seed(seed)
    # Of the library's three ways through the experts this is the fastest on a CPU: 1.1
    # times the loop over experts in float32, 2.4 times in bfloat16; the third, which
    # copies weights for each token, is ten times slower.
    model = Qwen3MoeForCausalLM._from_config(
        config, experts_implementation="grouped_mm", attn_implementation="sdpa"
    )
    for name, tensor in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            tensor.data.normal_(std=config.initializer_range)
    return model


def losses(
    model: Qwen3MoeForCausalLM, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of rows [n, length]: nats of each token after the first, [n, length - 1]; and
    the load-balancing loss, the mean over the layers, which is top-k if all experts are
    used alike."""
    with torch.autocast("cpu", torch.bfloat16):
        output = model(input_ids=rows, output_router_logits=True, use_cache=False)
    logits = output.logits[:, :-1].flatten(0, 1).float()
    nats = cross_entropy(logits, rows[:, 1:].flatten(), reduction="none")
    config = model.config
    # Layer by layer: over all layers at once an expert that one layer never uses could
    # be balanced by its namesake in another.
    balance = [
        load_balancing_loss_func(
            (layer.float(),), config.num_experts, config.num_experts_per_tok
        )
        for layer in output.router_logits
    ]
    return nats.view(len(rows), -1), torch.stack(balance).mean()


@torch.no_grad()
def bits_per_byte(
    model: Qwen3MoeForCausalLM, rows: torch.Tensor, token_bytes: torch.Tensor
) -> float:
    """The validation loss, in a unit that does not depend on the tokenizer."""
    nats = sum(float(losses(model, part)[0].sum()) for part in rows.split(8))
    return nats / math.log(2) / float(token_bytes[rows[:, 1:]].sum())


@torch.no_grad()
def expert_use(model: Qwen3MoeForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    """How often the tokens of `rows` choose each expert, as shares that add up to one
    in a layer: [layers, experts]."""
    config = model.config
    counts = torch.zeros(config.num_hidden_layers, config.num_experts)
    for part in rows.split(8):
        output = model(input_ids=part, output_router_logits=True, use_cache=False)
        for layer, logits in enumerate(output.router_logits):
            chosen = logits.topk(config.num_experts_per_tok).indices.flatten()
            counts[layer] += torch.bincount(chosen, minlength=config.num_experts)
    return counts / counts.sum(1, keepdim=True)
