# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A layer of stock's classes with our weight loader, and tensors of a checkpoint to
load into it by stock's own loaders."""

from dataclasses import replace
from functools import cache
from unittest.mock import patch

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
    RoutingMethodType,
)
from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError
from vllm.model_executor.layers.fused_moe.expert_slots.layer import slotted_class
from vllm.model_executor.layers.fused_moe.expert_slots.weights.coverage import (
    LoadCoverage,
    watching,
)

EXPERTS, HIDDEN, WIDTH = 4, 16, 24
UNQUANTIZED = "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method"
FP8_METHOD = "vllm.model_executor.layers.quantization.fp8"

slotted = cache(slotted_class)


def make_layer(
    stock=RoutedExperts,
    *,
    ranks=1,
    rank=0,
    expert_ranks=1,
    bias=False,
    gated=True,
    padding=(0, 0),
    transposed=False,
    method=None,
):
    """A layer of `stock`'s class with empty parameters and our weight loader.

    Args:
        expert_ranks: ranks that share the experts; this is the last.
        padding: what the method adds to the hidden size and to the width.
        method: makes a quantisation method of a FusedMoEConfig; None for stock's
            unquantised one.
    """

    real = stock._get_quant_method

    def padding_method(self, prefix, quant_config, moe_config):
        made = method(moe_config) if method else real(self, prefix, None, moe_config)
        made.maybe_roundup_sizes = lambda hidden, width, *_: (
            hidden + padding[0],
            width + padding[1],
        )
        return made

    parallel = replace(
        FusedMoEParallelConfig.make_no_parallel(),
        tp_size=ranks,
        tp_rank=rank,
        ep_size=expert_ranks,
        ep_rank=expert_ranks - 1,
        use_ep=expert_ranks > 1,
    )
    config = FusedMoEConfig(
        num_experts=EXPERTS,
        experts_per_token=2,
        hidden_dim=HIDDEN,
        intermediate_size=WIDTH,
        num_local_experts=EXPERTS // expert_ranks,
        num_logical_experts=EXPERTS,
        activation=MoEActivation.SILU,
        device="cpu",
        routing_method=RoutingMethodType.Default,
        moe_parallel_config=parallel,
        in_dtype=torch.bfloat16,
        has_bias=bias,
    )
    if not gated:  # which the CPU platform refuses
        config.activation = MoEActivation.RELU2_NO_MUL
    with (
        set_current_vllm_config(VllmConfig()),
        patch(
            f"{UNQUANTIZED}.select_unquantized_moe_backend", lambda **_: (None, None)
        ),
        patch(f"{FP8_METHOD}.validate_fp8_block_shape_moe"),
        patch.object(stock, "_get_quant_method", padding_method),
    ):
        layer = (cls := slotted(stock)).__new__(cls)
        stock.__init__(
            layer,
            layer_name="model.layers.1.mlp.experts",
            params_dtype=torch.bfloat16,
            moe_config=config,
            quant_config=None,
            expert_map_manager=ExpertMapManager(
                max_num_batched_tokens=8,
                top_k=2,
                global_num_experts=EXPERTS,
                num_redundant_experts=0,
                num_expert_group=None,
                moe_parallel_config=parallel,
                placement_strategy="linear",
                enable_eplb=False,
            ),
            ckpt_up_proj_name="up_proj" if gated else None,
            ckpt_gate_proj_name="gate_proj" if gated else "up_proj",
            is_fused_checkpoint_transposed=transposed,
        )
    layer.load_coverage = LoadCoverage(layer, "auto")
    return layer


def bf16(*shape):
    return torch.randn(shape).bfloat16()


def whole(gated=True, bias=False):
    """A layer's tensors, one an expert and projection, by their names in a
    checkpoint."""
    up = ["gate_proj", "up_proj"] if gated else ["up_proj"]
    tensors = {}
    for expert in range(EXPERTS):
        tensors |= {f"{expert}.{name}.weight": bf16(WIDTH, HIDDEN) for name in up}
        tensors[f"{expert}.down_proj.weight"] = bf16(HIDDEN, WIDTH)
        if bias:
            tensors |= {f"{expert}.{name}.bias": bf16(WIDTH) for name in up}
            tensors[f"{expert}.down_proj.bias"] = bf16(HIDDEN)
    return tensors


def load(layer, tensors):
    """By stock's loader, under the watch that a start has."""
    with watching([layer.load_coverage]):
        for _ in layer.load_weights(tensors.items()):
            pass


def assert_refused(layer, tensors, words):
    """In one line that names the layer and says what to do."""
    with pytest.raises(MoEPrefetchError, match=words) as refusal:
        load(layer, tensors)
    line = str(refusal.value)
    assert "\n" not in line and "Fetch the checkpoint again" in line
    assert "model.layers.1.mlp.experts.w" in line
