# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Into which parts a layer is divided for processing, and what a part is. What stock
makes of parts is compared with whole layers in `tests/quantised/test_rows.py`."""

from types import SimpleNamespace

import pytest
import torch

from vllm.model_executor.layers.fused_moe.expert_slots.weights.bundle import FEW
from vllm.model_executor.layers.fused_moe.expert_slots.weights.parts import (
    PART_BYTES,
    parts_of,
    process_in_parts,
)


def layer_of(experts: int, expert_bytes: int, device="meta", **more: torch.Tensor):
    """As it was read: two weights, on `device`."""
    layer = torch.nn.Module()
    layer.layer_name = "model.layers.0.mlp.experts"
    layer.num_experts = layer.local_num_experts = experts
    layer.moe_config = SimpleNamespace(num_local_experts=experts)
    layer.quant_method = SimpleNamespace()
    half = torch.empty(experts, expert_bytes // 2, dtype=torch.uint8, device=device)
    for name, tensor in {"w13_weight": half, "w2_weight": half.clone(), **more}.items():
        layer.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
    return layer


@pytest.mark.parametrize(
    ("experts", "expert_bytes", "sizes"),
    [
        (8, 4096, [8]),
        (128, 1 << 20, [128]),  # all of them in one part
        (256, 1 << 20, [128, 128]),
        (384, 22 << 20, [5] * 72 + [6] * 4),  # Kimi-K2, INT4
        (160, 3 << 20, [53, 53, 54]),  # at least 42 each
        (7, 200 << 20, [2, 2, 3]),  # a single expert is larger than a part
        (3, 200 << 20, [3]),
    ],
)
def test_parts_are_alike_and_hold_about_the_same_bytes(experts, expert_bytes, sizes):
    parts = parts_of(layer_of(experts, expert_bytes))
    assert sorted(map(len, parts)) == sizes and min(map(len, parts)) >= FEW
    assert [expert for part in parts for expert in part] == list(range(experts))
    at_least = min(experts, max(FEW, PART_BYTES // expert_bytes))
    assert at_least <= max(map(len, parts)) < 2 * at_least + FEW


@pytest.mark.parametrize(
    "name",
    [
        "w13_input_scale",
        "w2_input_global_scale",
        "w2_weight_scale_2",
        "w13_weight_global_scale",
    ],
)
def test_a_layer_with_values_of_all_experts_is_one_part(name):
    layer = layer_of(256, 1 << 20, **{name: torch.empty(256, device="meta")})
    assert parts_of(layer) == [range(256)]


def test_a_part_is_a_layer_of_its_experts():
    """With the router's tensors and all that is not of an expert; what was read stays
    as it is, whatever processing makes of its copies."""
    bias, shared = torch.arange(6.0), torch.tensor([5.0])
    layer = layer_of(6, 8, "cpu", e_score_correction_bias=bias, w2_shared=shared)
    read = torch.arange(24, dtype=torch.uint8).view(6, 4)
    layer.w13_weight.data, layer.w2_weight.data = read.clone(), read + 100
    layer.w13_weight.weight_loader = "its"
    before = dict(layer.named_parameters())
    seen = []

    def process(layer) -> None:
        count = layer.local_num_experts
        assert layer.num_experts == layer.moe_config.num_local_experts == count
        assert layer.w13_weight.weight_loader == "its"
        assert layer.e_score_correction_bias is before["e_score_correction_bias"]
        assert layer.w2_shared.tolist() == [5.0]
        assert not hasattr(layer.quant_method, "processed")
        seen.append(layer.w13_weight[:, 0].tolist())
        layer.quant_method.processed = True
        layer.w13_weight = torch.nn.Parameter(layer.w13_weight * 2, requires_grad=False)
        layer.w2_packed = torch.nn.Parameter(layer.w2_weight.int(), requires_grad=False)
        layer.w2_weight.data = layer.w2_packed.data

    parts = [range(2), range(2, 4), range(4, 6)]
    bundle, homes = process_in_parts(layer, process, torch.device("cpu"), parts)
    assert seen == [[0, 4], [8, 12], [16, 20]]
    assert homes.keys() == bundle.experts.keys() == {"w13_weight", "w2_weight"}
    assert torch.equal(homes["w13_weight"], read * 2)
    assert torch.equal(homes["w2_weight"], (read + 100).int())
    assert layer.local_num_experts == 6 and len(layer.w13_weight) == 2
    assert torch.equal(before["w13_weight"].data, read)
