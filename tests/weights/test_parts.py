# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Into which parts a layer is divided for processing, and what a part is. What stock
makes of parts is compared with whole layers in `tests/quantised/test_rows.py`."""

import mmap
from types import SimpleNamespace

import pytest
import torch

from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError
from vllm.model_executor.layers.fused_moe.expert_slots.weights import parts
from vllm.model_executor.layers.fused_moe.expert_slots.weights.bundle import FEW
from vllm.model_executor.layers.fused_moe.expert_slots.weights.host_pages import (
    forget_rows,
    host_tensor,
)
from vllm.model_executor.layers.fused_moe.expert_slots.weights.parts import (
    PART_BYTES,
    experts_at_a_time,
    parts_of,
    process_in_parts,
)


def parameter(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)


def layer_of(experts: int, expert_bytes: int, device="meta", **more: torch.Tensor):
    """As it was read: two weights, on `device`."""
    layer = torch.nn.Module()
    layer.layer_name = "model.layers.0.mlp.experts"
    layer.num_experts = layer.local_num_experts = experts
    layer.moe_config = SimpleNamespace(num_local_experts=experts)
    layer.quant_method = SimpleNamespace()
    half = torch.empty(experts, expert_bytes // 2, dtype=torch.uint8, device=device)
    for name, tensor in {"w13_weight": half, "w2_weight": half.clone(), **more}.items():
        layer.register_parameter(name, parameter(tensor))
    return layer


@pytest.mark.parametrize(
    ("experts", "expert_bytes", "sizes"),
    [
        (8, 4096, [8]),
        (128, 1 << 20, [128]),  # all of them in one part
        (129, 1 << 20, [64, 65]),
        (384, 22 << 20, [4] + [5] * 76),  # Kimi-K2, INT4
        (160, 3 << 20, [40, 40, 40, 40]),
        (7, 200 << 20, [2, 2, 3]),  # a single expert is larger than a part
        (4, 200 << 20, [2, 2]),
        (3, 200 << 20, [3]),
    ],
)
def test_parts_are_alike_and_hold_about_the_same_bytes(experts, expert_bytes, sizes):
    found = parts_of(layer_of(experts, expert_bytes))
    assert sorted(map(len, found)) == sizes
    assert [expert for part in found for expert in part] == list(range(experts))


@pytest.mark.parametrize("expert_bytes", [600 << 10, 2 << 20, 30 << 20, 70 << 20])
def test_the_plan_reserves_enough_for_every_rank(expert_bytes):
    """Of expert parallelism: the first rank is measured, others may have an expert
    less. No part has less than a few experts."""
    for experts in range(3, 300):
        layer = layer_of(experts, expert_bytes)
        for of_rank in (experts, experts - 1):
            sizes = list(map(len, parts_of(layer_of(of_rank, expert_bytes))))
            assert min(sizes) >= FEW and max(sizes) <= experts_at_a_time(layer)
        largest = experts_at_a_time(layer) * expert_bytes
        assert largest <= max(PART_BYTES, (FEW + 1) * expert_bytes)


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


def doubled(layer) -> None:
    """In the place of stock's processing: the first weight doubled, the second one in
    a tensor of another name and type, and a value that holds for all experts."""
    layer.quant_method.processed = True
    layer.w13_weight = parameter(layer.w13_weight * 2)
    layer.w2_packed = layer.w2_weight = parameter(layer.w2_weight.int())
    layer.scale = parameter(torch.tensor([0.5]))


@pytest.fixture
def of_two(monkeypatch):
    """Parts of two experts each."""
    pairs = [range(2), range(2, 4), range(4, 6)]
    monkeypatch.setattr(parts, "parts_of", lambda layer: pairs)


def test_a_part_is_a_layer_of_its_experts(of_two):
    """With the router's tensors and all that is not of an expert. What was read of the
    parts before takes no memory."""
    bias, shared = torch.arange(6.0), torch.tensor([5.0])
    others = {"e_score_correction_bias": bias, "shared": shared}
    layer = layer_of(6, 2 * mmap.PAGESIZE, "cpu", **others)
    read = torch.arange(1, 7, dtype=torch.uint8).view(6, 1).repeat(1, mmap.PAGESIZE)
    for weight in (layer.w13_weight, layer.w2_weight):
        weight.data = host_tensor(read.shape, read.dtype).copy_(read)
    layer.w13_weight.weight_loader = "its"
    before = dict(layer.named_parameters())
    seen = []

    def process(layer) -> None:
        count = layer.local_num_experts
        assert layer.num_experts == layer.moe_config.num_local_experts == count
        assert layer.w13_weight.weight_loader == "its"
        assert layer.e_score_correction_bias is before["e_score_correction_bias"]
        assert layer.shared.tolist() == [5.0]
        assert not hasattr(layer.quant_method, "processed")
        seen.append(layer.w13_weight[:, 0].tolist())
        assert layer.w2_weight.data_ptr() != before["w2_weight"].data_ptr()
        left = before["w2_weight"].data[:, -1].tolist()
        assert left == [0] * (seen[-1][0] - 1) + list(range(seen[-1][0], 7))
        doubled(layer)

    bundle, homes = process_in_parts(layer, process, torch.device("cpu"))
    assert seen == [[1, 2], [3, 4], [5, 6]]
    assert homes.keys() == bundle.experts.keys() == {"w13_weight", "w2_weight"}
    assert torch.equal(homes["w13_weight"], read * 2)
    assert torch.equal(homes["w2_weight"], read.int())
    assert bundle.values()["scale"].tolist() == [0.5]
    assert layer.local_num_experts == 6 and len(layer.w13_weight) == 2
    assert not before["w13_weight"].any() and bias.tolist() == list(range(6))


@pytest.mark.parametrize(
    "otherwise",
    [
        lambda layer: setattr(layer, "w2_extra", parameter(layer.w2_weight + 1)),
        lambda layer: setattr(layer, "w13_weight", parameter(layer.w13_weight.int())),
        lambda layer: setattr(layer, "w13_weight", parameter(layer.w13_weight[:, :1])),
        lambda layer: layer.scale.data.add_(1),
        lambda layer: setattr(layer, "scale", parameter(layer.scale.double())),
        lambda layer: setattr(layer, "other", parameter(torch.ones(1))),
    ],
    ids=["tensor", "dtype", "shape", "value", "type of a value", "name of a value"],
)
def test_parts_that_differ_are_refused(of_two, otherwise):
    """What stock made of all experts, though we thought that it does not, must not be
    served."""
    layer = layer_of(6, 8, "cpu")
    layer.w13_weight.data, layer.w2_weight.data = (
        torch.arange(24, dtype=torch.uint8).view(6, 4) + offset for offset in (0, 100)
    )

    def process(layer) -> None:
        last = layer.w13_weight[0, 0] == 16
        doubled(layer)
        if last:
            otherwise(layer)
            layer.w13_weight.data = layer.w13_weight.data.contiguous()

    with pytest.raises(MoEPrefetchError, match=r"^model\.layers\.0.*in parts\. Serve"):
        process_in_parts(layer, process, torch.device("cpu"))


def test_rows_are_forgotten_by_whole_pages():
    """A page that rows of two ranges share stays."""
    page = mmap.PAGESIZE
    tensor = host_tensor((6, page * 3 // 4), torch.uint8).fill_(7)
    forget_rows(tensor, range(2))
    flat = tensor.view(-1)
    assert not flat[:page].any() and (flat[page:] == 7).all()
    forget_rows(tensor, range(2, 4))
    assert not flat[2 * page : 3 * page].any() and (flat[3 * page :] == 7).all()
    assert (flat[page : 2 * page] == 7).all()
    forget_rows(tensor, range(4, 6))
    assert not flat[3 * page :].any()
    plain = torch.ones(2, page)
    forget_rows(plain, range(1))
    assert plain.all()
