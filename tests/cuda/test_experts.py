# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""vLLM's own fused-MoE kernel over permuted rows gives the bits of full residency, and
what a plain reference gives."""

from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.experts import triton_moe
from vllm.platforms import current_platform

from tests.support.cuda_library import stand_in_for_cuda_library
from tests.support.moe_layer import Layer
from vllm.model_executor.layers.fused_moe.expert_slots.cpu.memory import CPUMemory
from vllm.model_executor.layers.fused_moe.expert_slots.cuda import (
    experts,
    gather_kernel,
)


class LikeCuda:
    """This platform, which says that it is like CUDA: there, activations need no
    gate."""

    def is_cuda_alike(self) -> bool:
        return True

    def __getattr__(self, name: str):
        return getattr(current_platform, name)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    stand_in_for_cuda_library(monkeypatch)
    monkeypatch.setattr(
        "vllm.model_executor.layers.fused_moe.config.current_platform", LikeCuda()
    )
    monkeypatch.setattr(gather_kernel, "PROGRAMS", 2)


def assert_equal(
    layer: Layer, token_counts: tuple[int, ...], referenced: int = 40
) -> None:
    """Every batch has stock's bits, and up to `referenced` tokens a plain reference's
    values."""
    for tokens in token_counts:
        batch = layer.batch(tokens)
        stock, slots = layer.run("stock", *batch), layer.run("slots", *batch)
        assert stock.isfinite().all() and stock.abs().max() > 0
        assert torch.equal(slots, stock)
        few = [tensor[:referenced] for tensor in batch]
        tolerance = 1e-5 if layer.dtype == torch.float32 else 5e-3
        torch.testing.assert_close(
            slots[:referenced].float(),
            layer.reference(*few),
            atol=tolerance,
            rtol=tolerance,
        )
    counters = layer.manager.counters
    assert counters.loads > 0 and counters.steps == len(token_counts)


N_1 = {"top_k": 1, "slots": 1}


@pytest.mark.parametrize(
    "options",
    [
        *({"slots": slots} for slots in (3, 4, 8, 12, 15)),
        N_1,
        {"slots": 4, "policy": "lfu", "bias": True},
        {"slots": 15, "bias": True, "dtype": torch.float16},
        {"slots": 5, "dtype": torch.float16},
        N_1 | {"weight_on_input": True},
        {"slots": 15, "top_k": 1, "weight_on_input": True, "bias": True},
        *(
            {"slots": 3 + number, "activation": activation, "bias": number % 2 == 0}
            for number, activation in enumerate(MoEActivation)
            if activation
            is not MoEActivation.RELU2  # which stock's kernel does not take
        ),
    ],
    ids=lambda options: "-".join(f"{getattr(v, 'value', v)}" for v in options.values()),
)
def test_slots_equal_full_residency(options):
    """Steps of one token and of many: few slots, all but one, every activation, biases,
    the router's weight on the input; unaligned shortcut and aligned blocks."""
    layer = Layer(**options)
    assert_equal(layer, (1, 9, 2, 30))
    if layer.slots < 10:
        assert layer.manager.counters.staged > 0
        assert layer.manager.counters.overflow_steps > 0


@pytest.mark.parametrize("tokens", [128, 1000, 8192])
def test_long_prefills_equal_full_residency(tokens):
    """Every expert is needed; with four slots twelve are staged, in one launch."""
    layer = Layer(slots=4)
    assert_equal(layer, (tokens, 1), referenced=20)
    assert layer.manager.counters.staged >= 12 - 3


def test_the_kernel_is_called_as_stock_calls_it(monkeypatch):
    """Same configuration, same shapes, same shortcut: what stock's kernel is handed
    differs in rows of weights and ids alone."""
    calls = []
    invoke = triton_moe.invoke_fused_moe_triton_kernel

    def spy(a, b, c, *args, **kwargs):
        sorted_ids, _, _, mul, top_k, config = args[3:9]
        shapes = (
            a.shape,
            b.shape,
            c.shape,
            None if sorted_ids is None else len(sorted_ids),
        )
        calls.append((shapes, mul, top_k, config, kwargs["compute_type"], b.stride()))
        invoke(a, b, c, *args, **kwargs)

    monkeypatch.setattr(triton_moe, "invoke_fused_moe_triton_kernel", spy)
    layer = Layer(slots=3)
    for tokens in (1, 2, 40):
        batch = layer.batch(tokens)
        calls.clear()
        layer.run("stock", *batch)
        stock = calls.copy()
        calls.clear()
        layer.run("slots", *batch)
        assert calls == stock and len(stock) == 2
        assert (stock[0][0][3] is None) == (tokens == 1)


def test_two_layers_share_staging_and_nothing_else():
    """Layer after layer, step after step: what one stages does not disturb the other's
    slots."""
    memory = CPUMemory()
    layers = [Layer(slots=4, seed=seed, memory=memory) for seed in range(3)]
    for tokens in (30, 1, 5, 40):
        for layer in layers:
            batch = layer.batch(tokens)
            assert torch.equal(layer.run("slots", *batch), layer.run("stock", *batch))
    for layer in layers:
        residents = layer.manager.residency()
        for name, slots in layer.manager.rows.slot_rows.items():
            assert torch.equal(slots, layer.tensors[name][residents])
    rows = 3 * 4 + 12
    assert memory.committed == pytest.approx(
        rows * layers[0].manager.store.bytes_per_expert, abs=6 * 2 * memory.page
    )


@pytest.mark.parametrize("slots", [1, 4, 15])
def test_padding_rows_fetch_nothing(slots):
    """Rows of id -1 load nothing, one step or many; the other rows keep their bits."""
    layer = Layer(slots=slots, top_k=1)
    for tokens in (1, 8):
        x, weights, ids = layer.batch(tokens + 4)
        ids[tokens:] = -1
        before = layer.manager.counters.needed
        got = layer.run("slots", x, weights, ids)
        assert layer.manager.counters.needed - before == len(ids[:tokens].unique())
        full = layer.run("stock", x, weights, ids)
        assert torch.equal(got[:tokens], full[:tokens])


class TestMasks:
    """`ForwardContext.is_padding`, as the two model runners leave it."""

    def run(self, monkeypatch, mask, skip: bool):
        layer = Layer(slots=4)
        monkeypatch.setattr(experts.envs, "VLLM_MOE_SKIP_PADDING", skip, raising=False)
        monkeypatch.setattr(experts, "is_forward_context_available", lambda: True)
        context = SimpleNamespace(is_padding=mask)
        monkeypatch.setattr(experts, "get_forward_context", lambda: context)
        x, weights, ids = layer.batch(6)
        got, full = (
            layer.run("slots", x, weights, ids),
            layer.run("stock", x, weights, ids),
        )
        return layer, ids, got, full

    def test_padding_rows_by_mask_fetch_nothing(self, monkeypatch):
        """Set: rewritten each step, and longer than the batch in some runners."""
        mask = torch.tensor([False, False, True, True, True, True, True, True])
        layer, ids, got, full = self.run(monkeypatch, mask, skip=True)
        assert layer.manager.counters.needed == len(ids[:2].unique())
        assert torch.equal(got[:2], full[:2])
        assert (
            got.isfinite().all()
        )  # staging that nothing was loaded into is computed on

    @pytest.mark.parametrize("mask", [torch.ones(6, dtype=torch.bool), None])
    def test_a_mask_that_capture_left_is_not_read(self, monkeypatch, mask):
        """Unset: a runner leaves the capture's all-true mask in place; every row is
        real."""
        layer, ids, got, full = self.run(monkeypatch, mask, skip=False)
        assert layer.manager.counters.needed == len(ids.unique())
        assert torch.equal(got, full)

    def test_no_mask(self, monkeypatch):
        _, _, got, full = self.run(monkeypatch, None, skip=True)
        assert torch.equal(got, full)


def rank_maps(placement: str, model: int = 16) -> list[torch.Tensor]:
    """Each of two ranks' expert map."""
    all_experts, maps = torch.arange(model), []
    for rank in range(2):
        here = (
            all_experts[rank::2]
            if placement == "round robin"
            else all_experts.chunk(2)[rank]
        )
        maps.append(torch.full((model,), -1, dtype=torch.int32))
        maps[-1][here] = torch.arange(len(here), dtype=torch.int32)
    return maps


@pytest.mark.parametrize(
    ("placement", "slots"),
    [("linear", 1), ("round robin", 3), ("linear", 4), ("round robin", 7)],
)
def test_each_rank_of_expert_parallelism_equals_stocks(placement, slots):
    """Two ranks of eight experts each route ids of all sixteen; from slots, each has
    the bits of stock's rank, staged steps included, and counts its own experts
    alone."""
    for expert_map in rank_maps(placement):
        layer = Layer(slots=slots, experts=8, expert_map=expert_map)
        needed = 0
        for tokens in (1, 9, 2, 24):
            x, weights, ids = layer.batch(tokens)
            ids[tokens // 2 + 1 :, 0] = -1
            here = expert_map[ids[ids >= 0].long()]
            needed += len(here[here >= 0].unique())
            full, got = (
                layer.run(kernel, x, weights, ids) for kernel in ("stock", "slots")
            )
            assert full.isfinite().all() and torch.equal(got, full)
        counters = layer.manager.counters
        assert counters.needed == needed and counters.loads > 0
        assert slots == 7 or counters.staged > 0
        layer.manager.residency()
