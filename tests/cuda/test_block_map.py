# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Marlin's batches are aligned on experts and their blocks mapped to rows: the kernel
is handed stock's blocks in stock's order, and gives the bits of full residency."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.model_executor.layers.fused_moe.experts import marlin_moe
from vllm.model_executor.layers.fused_moe.moe_align_block_size import (
    moe_align_block_size,
)

from tests.cuda.recorder import Recorder
from tests.cuda.test_experts import rank_maps
from tests.support.marlin_layer import Layer, align, gemm, gemms, stand_in_for_marlin
from vllm import _custom_ops as ops
from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError
from vllm.model_executor.layers.fused_moe.expert_slots.cuda import (
    block_map_kernel,
    gather_kernel,
    marlin_experts,
)
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.marlin_experts import (
    mapping_blocks,
)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    stand_in_for_marlin(monkeypatch)
    monkeypatch.setattr(gather_kernel, "PROGRAMS", 2)
    monkeypatch.setattr(block_map_kernel, "BLOCKS", 8)


def both(layer: Layer, batch, real: torch.Tensor | None = None) -> torch.Tensor:
    """Runs a step in both ways: same bits, and same blocks but for the table."""
    gemms.clear()
    stock, slots = layer.run("stock", *batch), layer.run("slots", *batch)
    table = layer.manager.expert_to_row
    assert sorted(table.tolist()) == list(range(layer.experts))
    of_stock, of_slots = gemms[:2], gemms[2:]
    assert len(of_stock) == len(of_slots) == 2
    for theirs, ours in zip(of_stock, of_slots, strict=True):
        assert theirs[0] == ours[0] and theirs[3] == ours[3] > 0
        assert torch.equal(theirs[1], ours[1])
        assert theirs[2].min() >= 0
        assert torch.equal(table[theirs[2]], ours[2])
    real = torch.arange(len(stock)) if real is None else real
    assert stock[real].isfinite().all() and stock[real].abs().max() > 0
    assert torch.equal(slots[real], stock[real])
    return stock


@pytest.mark.parametrize(
    ("kind", "slots"), [("int4", 3), ("zeros", 15), ("nvfp4", 4), ("zeros", 8)]
)
def test_slots_equal_full_residency(kind, slots):
    """Steps of few tokens and of many, that need more experts than there are slots."""
    layer = Layer(kind, slots)
    for tokens in (1, 9, 2, 40):
        batch = layer.batch(tokens)
        out = both(layer, batch)
        torch.testing.assert_close(
            out[:9].float(),
            layer.reference(*(t[:9] for t in batch)),
            atol=2e-3,
            rtol=1e-2,
        )
    counters = layer.manager.counters
    assert counters.loads > 0 and (counters.staged > 0 or slots == 15)
    layer.manager.residency()


@pytest.mark.parametrize("slots", [1, 7])
def test_each_rank_of_expert_parallelism_equals_stocks(slots):
    """Stock's alignment gives ids of this rank, and no block to other ranks' experts or
    to rows of no expert."""
    for expert_map in rank_maps("round robin"):
        layer = Layer("int4", slots, experts=8, expert_map=expert_map)
        for tokens in (24, 2):
            batch = layer.batch(tokens)
            batch[2][tokens // 2 + 1 :, 0] = -1
            both(layer, batch)
        assert layer.manager.counters.loads > 0


def _as_unit(recorder, work):
    """A launch that returns its second argument, which it writes."""
    unit = recorder.unit(work.__name__, work)

    def launch(x, out, *args, **kwargs):
        unit(x, out, *args, **kwargs)
        return out

    return launch


def test_a_recorded_step_maps_what_comes_later(monkeypatch):
    """As a CUDA graph: the host reads no device value, and a step launches what stock
    launches, two kernels before it and one behind the alignment."""
    layer = Layer("zeros", 4)
    launches = {}
    for kernel in ("stock", "slots"):
        recorder = Recorder()
        x, weights, ids = (torch.zeros_like(t) for t in layer.batch(8))
        ids.fill_(-1)
        with recorder.recording(monkeypatch), monkeypatch.context() as patch:
            patch.setattr(ops, "moe_align_block_size", recorder.unit("align", align))
            patch.setattr(ops, "moe_wna16_marlin_gemm", _as_unit(recorder, gemm))
            out = layer.run(kernel, x, weights, ids)
        launches[kernel] = recorder.launches
    at = launches["stock"].index("align") + 1
    assert launches["slots"] == [
        "plan_kernel",
        "gather_kernel",
        *launches["stock"][:at],
        "block_map_kernel",
        *launches["stock"][at:],
    ]
    for _ in range(5):
        batch = layer.batch(8)
        for buffer, value in zip((x, weights, ids), batch, strict=True):
            buffer.copy_(value)
        recorder.replay()
        assert torch.equal(out, layer.run("stock", *batch))
    assert layer.manager.counters.staged > 0


def test_rows_of_no_expert_have_no_block():
    """Padding by -1: fetches nothing, and real rows keep their bits."""
    layer = Layer("nvfp4", 4)
    x, weights, ids = layer.batch(8)
    ids[3:] = -1
    both(layer, (x, weights, ids), torch.arange(3))
    assert layer.manager.counters.needed == len(ids[:3].unique())


def test_a_kernel_that_is_not_hooked_is_refused(monkeypatch):
    """Another plugin put its own alignment in the place of ours."""
    monkeypatch.setattr(marlin_moe, "moe_align_block_size", moe_align_block_size)
    layer = Layer("int4", 4)
    with pytest.raises(MoEPrefetchError, match="did not align its batch"):
        layer.run("slots", *layer.batch(2))


def test_two_hooks_map_once(monkeypatch):
    """The hook around itself, as after a second registration."""
    twice = mapping_blocks(marlin_moe.moe_align_block_size)
    monkeypatch.setattr(marlin_moe, "moe_align_block_size", twice)
    layer = Layer("int4", 4)
    for tokens in (30, 2):
        both(layer, layer.batch(tokens))


def test_another_thread_is_not_mapped():
    """Another engine's stock layer aligns while this thread's layer is in its call."""
    ids = torch.tensor([[2, 5], [1, 2]], dtype=torch.int32)
    found = []

    def aligned() -> None:
        found.append(marlin_moe.moe_align_block_size(ids, 8, 6)[1][:3].tolist())

    with marlin_experts._blocks_mapped(torch.arange(6, dtype=torch.int32).flip(0)):
        thread = threading.Thread(target=aligned)
        thread.start()
        thread.join()
        aligned()
    aligned()
    assert found == [[1, 2, 5], [4, 3, 0], [1, 2, 5]]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_aligned_then_mapped_is_the_table_of_stocks_blocks(data):
    """With rows of no expert, expert maps, and any permutation as the table."""
    experts = data.draw(st.integers(1, 40), "experts")
    here = data.draw(st.integers(1, experts), "on this rank")
    tokens, top_k = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 4))
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 999), "seed"))
    ids = torch.randint(-1, experts, (tokens, top_k), generator=rng).int()
    expert_map = None
    if here < experts:
        expert_map = torch.full((experts,), -1, dtype=torch.int32)
        chosen = torch.randperm(experts, generator=rng)[:here]
        expert_map[chosen] = torch.arange(here, dtype=torch.int32)
    table = torch.randperm(here, generator=rng).int()
    size = data.draw(st.sampled_from([1, 8, 16, 48]), "block")
    args = (ids, size, experts, expert_map)
    plain = moe_align_block_size(*args, ignore_invalid_experts=True)
    with marlin_experts._blocks_mapped(table):
        mapped = marlin_moe.moe_align_block_size(*args, ignore_invalid_experts=True)
    assert torch.equal(plain[0], mapped[0]) and torch.equal(plain[2], mapped[2])
    used = int(plain[2]) // size
    assert torch.equal(table[plain[1][:used]], mapped[1][:used])
    rest = mapped[1][used:]
    assert ((rest >= -1) & (rest < here)).all()


@settings(max_examples=40, deadline=None)
@given(
    blocks=st.lists(st.integers(-3, 12) | st.integers(-(2**31), 2**31 - 1)),
    table=st.permutations(range(9)),
)
def test_what_is_no_expert_becomes_none(blocks, table):
    """Also -1 amid the list, as where stock does not leave out other ranks'."""
    mapped = torch.tensor(blocks, dtype=torch.int32)
    block_map_kernel.map_blocks(mapped, torch.tensor(table, dtype=torch.int32))
    expected = [table[b] if 0 <= b < 9 else -1 for b in blocks]
    assert mapped.tolist() == expected
