# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A step that was recorded once, as a CUDA graph records it, is right for whatever
comes after; and it launches what stock's step launches, and two kernels more."""

import random
from types import SimpleNamespace

import pytest
import torch

from tests.cuda.recorder import Recorder
from tests.cuda.test_experts import rank_maps
from tests.support.cuda_library import stand_in_for_cuda_library
from tests.support.moe_layer import HIDDEN, Layer
from vllm.model_executor.layers.fused_moe.expert_slots.cpu.memory import CPUMemory
from vllm.model_executor.layers.fused_moe.expert_slots.cuda import (
    experts,
    gather_kernel,
)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    stand_in_for_cuda_library(monkeypatch)
    monkeypatch.setattr(gather_kernel, "PROGRAMS", 2)


STEPS = 100
"""Of each of four layers."""


class Graph:
    """One step of a layer for one number of tokens, recorded on padding, replayed on
    anything."""

    def __init__(self, layer: Layer, tokens: int, monkeypatch, kernel: str = "slots"):
        self.layer, self.tokens = layer, tokens
        self.x = torch.zeros(tokens, HIDDEN, dtype=layer.dtype)
        self.weights = torch.zeros(tokens, layer.top_k)
        self.ids = torch.full((tokens, layer.top_k), -1, dtype=torch.int32)
        self.recorder = Recorder()
        with self.recorder.recording(monkeypatch):
            self.output = layer.run(kernel, self.x, self.weights, self.ids)

    def __call__(self, x, weights, ids) -> torch.Tensor:
        for buffer, value in ((self.x, x), (self.weights, weights), (self.ids, ids)):
            buffer.copy_(value)
        self.recorder.replay()
        return self.output


class Mask:
    """The runner's mask: all true at capture, rewritten before each replay."""

    def __init__(self, monkeypatch, tokens: int):
        self.rows = torch.ones(tokens, dtype=torch.bool)
        monkeypatch.setattr(experts, "is_forward_context_available", lambda: True)
        monkeypatch.setattr(
            experts,
            "get_forward_context",
            lambda: SimpleNamespace(is_padding=self.rows),
        )


@pytest.mark.parametrize(
    ("options", "masked"),
    [
        ({"slots": 4}, False),
        ({"slots": 5, "policy": "lfu", "bias": True}, True),
        ({"slots": 3, "experts": 8, "expert_map": rank_maps("round robin")[1]}, False),
        ({"slots": 15}, True),
    ],
    ids=("lru", "lfu, mask", "expert parallelism", "all but one, mask"),
)
def test_replays_equal_eager_for_hundreds_of_steps(monkeypatch, options, masked):
    """Batches of 1, 2, 4 and 8 in any order, padded to their graph's size, steps that
    stage among them: outputs are stock's, tables and counters those of a twin that
    never was recorded."""
    mask = Mask(monkeypatch, 8) if masked else None
    layer, twin = Layer(**options), Layer(**options)
    graphs = {tokens: Graph(layer, tokens, monkeypatch) for tokens in (8, 4, 2, 1)}
    assert layer.manager.counters.steps == 0
    rng = random.Random(0)
    for _ in range(STEPS):
        tokens = rng.choice([1, 1, 2, 3, 4, 7, 8])
        graph = next(graphs[size] for size in (1, 2, 4, 8) if size >= tokens)
        x, weights, ids = layer.batch(graph.tokens)
        if mask is None:
            ids[tokens:] = -1
        else:
            mask.rows[: graph.tokens] = torch.arange(graph.tokens) >= tokens
        got = graph(x, weights, ids)[:tokens].clone()
        assert torch.equal(got, layer.run("stock", x, weights, ids)[:tokens])
        assert torch.equal(got, twin.run("slots", x, weights, ids)[:tokens])
        assert layer.manager.counters.as_dict() == twin.manager.counters.as_dict()
        assert layer.manager.residency() == twin.manager.residency()
    counters = layer.manager.counters
    assert counters.steps > 0.9 * STEPS and counters.loads > 0
    assert options["slots"] == 15 or counters.staged > 0


def test_layers_in_one_graph_share_staging(monkeypatch):
    """Two layers recorded one after the other, in one memory."""
    memory = CPUMemory()
    layers = [Layer(slots=4, seed=seed, memory=memory) for seed in range(2)]
    graphs = [Graph(layer, 8, monkeypatch) for layer in layers]
    for _ in range(20):
        for layer, graph in zip(layers, graphs, strict=True):
            batch = layer.batch(8)
            assert torch.equal(graph(*batch), layer.run("stock", *batch))


@pytest.mark.parametrize(
    "options",
    [
        {"slots": 1, "top_k": 1},
        {"slots": 3, "bias": True},
        {"slots": 8, "policy": "lfu"},
        {"slots": 15},
        {"slots": 3, "experts": 8, "expert_map": rank_maps("linear")[0]},
        {"slots": 1, "top_k": 1, "weight_on_input": True},
    ],
    ids=lambda options: "-".join(map(str, list(options.values())[:2])),
)
def test_a_step_launches_what_stock_launches_and_two_kernels(monkeypatch, options):
    """Of every size: plan and gather come first, then stock's launches in stock's
    order."""
    layer = Layer(**options)
    for tokens in (1, 2, 9, 64, 600) + (8192,) * (layer.slots == 3):
        stock = Graph(layer, tokens, monkeypatch, "stock").recorder.launches
        slots = Graph(layer, tokens, monkeypatch).recorder.launches
        # On its input the router's weight is applied by stock before the kernel is
        # called.
        first = len(slots) - len(stock) - 2 + slots.index("plan_kernel")
        assert slots[first : first + 2] == ["plan_kernel", "gather_kernel"]
        assert slots[:first] + slots[first + 2 :] == stock
        assert {"fused_moe_kernel", "activate", "moe_sum"} <= set(stock)


def test_a_host_read_is_noticed(monkeypatch):
    """The recorder itself."""
    recorder = Recorder()
    with (
        pytest.raises(AssertionError, match="host reads"),
        recorder.recording(monkeypatch),
    ):
        torch.ones(1).item()
