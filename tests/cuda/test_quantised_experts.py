# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""vLLM's own kernels for quantised experts over permuted rows give the bits of full
residency, and about what a reference on the dequantised weights gives."""

from types import SimpleNamespace

import pytest
import torch

from tests.support.cuda_library import stand_in_for_cuda_library
from tests.support.moe_formats import FORMATS
from tests.support.moe_layer import Layer
from vllm.model_executor.layers.fused_moe.expert_slots.cuda import (
    experts,
    gather_kernel,
)

EXPERTS = 8


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    stand_in_for_cuda_library(monkeypatch)
    monkeypatch.setattr(gather_kernel, "PROGRAMS", 2)


def layer_of(name: str, slots: int, **options) -> Layer:
    """The interpreter casts integers to bfloat16 wrongly, so activations are float16.
    Blocks of 128 x 128 need weights that have more than one."""
    size = {"hidden": 256, "width": 128} if "block" in name else {"hidden": 128}
    options = {"width": 64, "dtype": torch.float16, "top_k": 2} | size | options
    return Layer(slots=slots, experts=EXPERTS, quant=FORMATS[name], **options)


def distance(layer: Layer, got: torch.Tensor, *batch: torch.Tensor) -> float:
    """How far the output is from the reference, as a part of its size."""
    meant = layer.reference(*batch)
    return ((got.float() - meant).norm() / meant.norm()).item()


def assert_equal(layer: Layer, token_counts: tuple[int, ...]) -> None:
    for tokens in token_counts:
        batch = layer.batch(tokens)
        stock, slots = layer.run("stock", *batch), layer.run("slots", *batch)
        assert torch.equal(slots, stock)
        assert distance(layer, slots, *batch) < layer.quant.tolerance
    counters = layer.manager.counters
    assert counters.loads > 0 and counters.steps == len(token_counts)


@pytest.mark.parametrize(
    ("name", "slots"),
    [
        *((name, 3) for name in FORMATS),
        ("fp8 dynamic", EXPERTS - 1),
        ("int4 groups", EXPERTS - 1),
    ],
)
def test_slots_equal_full_residency(name, slots):
    """One token, by the unaligned shortcut where the format has it, and nine, which
    need more experts than three slots hold."""
    layer = layer_of(name, slots)
    assert_equal(layer, (1, 9))
    if slots == 3:
        assert layer.manager.counters.overflow_steps > 0
    residents = layer.manager.residency()
    for part, rows in layer.manager.rows.slot_rows.items():
        whole = layer.tensors[part][residents]
        assert torch.equal(rows.view(torch.uint8), whole.view(torch.uint8)), part


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fp8 channel", {"bias": True}),
        ("int8 channel", {"bias": True, "policy": "lfu"}),
        ("fp8 block", {"top_k": 1, "weight_on_input": True}),
        ("int4 groups", {"top_k": 1}),
    ],
)
def test_biases_one_slot_and_weight_on_input(name, options):
    slots = 1 if "top_k" in options else 4
    assert_equal(layer_of(name, slots, **options), (1, 7))


def test_swapped_operands(monkeypatch):
    """On some GPUs stock's kernel computes small FP8 tiles transposed."""
    module = "vllm.model_executor.layers.fused_moe.fused_moe"
    monkeypatch.setattr(f"{module}.enable_swap_ab", lambda *_: True)
    assert_equal(layer_of("fp8 block", 3), (1, 9))


@pytest.mark.parametrize("name", FORMATS)
def test_each_tensor_must_follow_its_expert(name):
    """With one tensor left in the order of experts the output is another one. So the
    tests above notice a scale, zero point or factor that is not moved."""
    layer = layer_of(name, 3)
    x, weights, _ = layer.batch(1)
    batch = x, weights, torch.tensor([[0, 1]], dtype=torch.int32)
    stock = layer.run("stock", *batch)
    assert torch.equal(layer.run("slots", *batch), stock)
    assert layer.manager.expert_to_row[:2].tolist() == [5, 6]
    for part, parameter in layer.parameters.items():
        rows, parameter.data = parameter.data, layer.tensors[part]
        wrong = layer.run("slots", *batch)
        parameter.data = rows
        assert not torch.equal(wrong, stock), part
        assert not distance(layer, wrong, *batch) < layer.quant.tolerance, part


@pytest.mark.parametrize("name", ["fp8 block", "fp8 dynamic", "int4 zero points"])
def test_each_rank_of_expert_parallelism_equals_stocks(name):
    """A rank of eight of the model's sixteen experts, with every other id."""
    expert_map = torch.full((16,), -1, dtype=torch.int32)
    expert_map[1::2] = torch.arange(8, dtype=torch.int32)
    layer = layer_of(name, 3, expert_map=expert_map)
    for tokens in (1, 9):
        x, weights, ids = layer.batch(tokens)
        ids[0, 0] = 1  # one at least is here
        batch = x, weights, ids
        stock, slots = layer.run("stock", *batch), layer.run("slots", *batch)
        assert torch.equal(slots, stock)
        assert distance(layer, slots, *batch) < layer.quant.tolerance
    assert layer.manager.counters.loads > 0


class TestPadding:
    """Rows of padding for which the router names experts, as one without a mask
    does."""

    REAL = 2

    def run(self, monkeypatch, name: str):
        layer = layer_of(name, 3)
        mask = torch.arange(6) >= self.REAL
        context = SimpleNamespace(is_padding=mask)
        monkeypatch.setattr(experts.envs, "VLLM_MOE_SKIP_PADDING", True, raising=False)
        monkeypatch.setattr(experts, "is_forward_context_available", lambda: True)
        monkeypatch.setattr(experts, "get_forward_context", lambda: context)
        x, weights, ids = layer.batch(6)
        ids[: self.REAL] = torch.tensor([0, 1])
        ids[self.REAL :] = torch.tensor([6, 7])  # in no slot yet, and the largest
        stock = layer.run("stock", x, weights, ids)
        slots = layer.run("slots", x, weights, ids)
        assert torch.equal(slots[: self.REAL], stock[: self.REAL])
        return layer.manager.counters.needed

    def test_it_fetches_nothing(self, monkeypatch):
        assert self.run(monkeypatch, "fp8 channel") == 2

    def test_it_is_loaded_where_one_scale_is_of_all_tokens(self, monkeypatch):
        """Otherwise what a staging row holds would change the scale of real tokens."""
        assert self.run(monkeypatch, "fp8 dynamic") == 4
