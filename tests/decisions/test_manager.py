# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The decisions' invariants hold for every routing, slot count and policy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchConfig
from vllm.model_executor.layers.fused_moe.expert_slots.cpu.manager import CPUSlotManager
from vllm.model_executor.layers.fused_moe.expert_slots.cpu.memory import CPUMemory
from vllm.model_executor.layers.fused_moe.expert_slots.decisions.policy import (
    FREQUENCY_UNIT,
    MAX_HALF_LIFE,
    ExpertHistory,
)
from vllm.model_executor.layers.fused_moe.expert_slots.weights.rows import ExpertRows
from vllm.model_executor.layers.fused_moe.expert_slots.weights.store import ExpertStore


def make_manager(
    num_experts: int,
    num_slots: int,
    policy: str,
    half_life: int = 4,
    memory=None,
    traced: bool = False,
) -> CPUSlotManager:
    """Rows of one page each, so that all of staging is shared."""
    rows = torch.arange(num_experts * 1024, dtype=torch.float32).reshape(
        num_experts, 2, 512
    )
    store = ExpertStore({"w13_weight": rows, "w2_weight": -rows[:, 0]})
    config = MoEPrefetchConfig(
        slots=num_slots,
        policy=policy,
        lfu_half_life=half_life,
        trace="not written" if traced else None,
    )
    return CPUSlotManager(config, ExpertRows(store, num_slots, memory or CPUMemory()))


@st.composite
def routings(draw):
    num_experts = draw(st.integers(2, 24))
    num_slots = draw(st.integers(1, num_experts - 1))
    top_k = draw(st.integers(1, min(4, num_slots)))
    step = st.lists(
        st.lists(st.integers(-1, num_experts - 1), min_size=top_k, max_size=top_k),
        min_size=1,
        max_size=20,
    )
    steps = draw(st.lists(step, min_size=1, max_size=12))
    return num_experts, num_slots, draw(st.sampled_from(["lru", "lfu"])), steps


def resident(manager: CPUSlotManager) -> set[int]:
    return set(manager.residency())


@settings(max_examples=150, deadline=None)
@given(routings())
def test_every_step_keeps_the_invariants(case):
    num_experts, num_slots, policy, steps = case
    memory = CPUMemory()
    manager, other_layer = (
        make_manager(num_experts, num_slots, policy, memory=memory) for _ in range(2)
    )
    twin = make_manager(num_experts, num_slots, policy)
    for step in steps:
        topk_ids = torch.tensor(step, dtype=torch.int32)
        needed = set(topk_ids.flatten().tolist()) - {-1}
        before, counted = resident(manager), manager.counters.as_dict()
        values = manager.history.values().copy()
        rows = manager.step(topk_ids)
        # The kernel finds every expert that it needs in the row that it is told.
        assert torch.equal(rows < 0, topk_ids < 0) and rows.dtype == topk_ids.dtype
        for expert, row in zip(
            topk_ids.flatten().tolist(), rows.flatten().tolist(), strict=True
        ):
            for name, home in manager.store.tensors.items():
                assert expert < 0 or torch.equal(
                    manager.rows.tensors[name][row], home[expert]
                )
        # Each missing expert crosses once; what is needed and resident stays.
        moved = {
            name: value - counted[name]
            for name, value in manager.counters.as_dict().items()
        }
        after, misses = resident(manager), needed - before
        assert moved["needed"] == len(needed) and moved["hits"] == len(needed & before)
        assert moved["loads"] == moved["misses"] == len(misses)
        assert before & needed <= after and after <= before | needed
        assert moved["staged"] == len(misses - after)
        assert moved["evictions"] == len(after - before) == len(before - after)
        assert moved["overflow_steps"] == (len(needed) > num_slots)
        assert moved["staged_steps"] == (len(misses - after) > 0)
        # Staged only when no slot was left; those kept were worth most, the evicted
        # least.
        assert not misses - after or after <= needed
        worth = [(-values[e], e) for e in misses]
        assert sorted(worth)[: len(after - before)] == sorted(
            (-values[e], e) for e in after - before
        )
        kept = [(values[e], e) for e in before - needed & after]
        gone = [(values[e], e) for e in before - after]
        assert not gone or not kept or max(gone) < min(kept)
        # Another layer writes staging; slots are this layer's own.
        other_layer.step(torch.arange(num_experts).reshape(1, -1))
        for name, slots in manager.rows.slot_rows.items():
            assert torch.equal(slots, manager.store.tensors[name][manager.residency()])
        plan = twin.plan(topk_ids)
        assert twin.residency() == manager.residency()
        assert twin.counters.as_dict() == manager.counters.as_dict()
        assert (twin.history.values() == manager.history.values()).all()
        assert twin.history.step == manager.history.step
        assert len(plan.load_experts) == plan.misses and plan.staged == moved["staged"]


def test_lru_evicts_the_expert_needed_longest_ago():
    manager = make_manager(6, 3, "lru")
    for expert in (0, 1, 2, 0, 5):
        manager.step(torch.tensor([[expert]]))
    assert resident(manager) == {0, 2, 5}


def test_lfu_evicts_the_expert_needed_least_often():
    manager = make_manager(6, 3, "lfu", half_life=64)
    for expert in (0, 0, 1, 1, 2, 5):
        manager.step(torch.tensor([[expert]]))
    assert resident(manager) == {0, 1, 5}


def test_a_step_that_needs_too_much_keeps_what_was_worth_most():
    """All hits stay, and of the misses those needed most recently get the slots, not
    the lowest."""
    manager = make_manager(12, 4, "lru")
    for expert in (9, 11, 7, 0, 1, 2, 3):  # the last four are resident now
        manager.step(torch.tensor([[expert]]))
    assert resident(manager) == {0, 1, 2, 3}
    manager.step(
        torch.tensor([[0, 1, 5, 6, 7, 8, 9, 10, 11]])
    )  # two hits, seven misses
    assert resident(manager) == {0, 1, 7, 11}
    assert manager.counters.staged == 5


def test_a_mask_of_padding_rows_needs_nothing():
    manager = make_manager(8, 3, "lru")
    ids = torch.tensor([[5], [6]], dtype=torch.int32)
    rows = manager.step(ids, torch.tensor([False, True]))
    assert manager.counters.needed == 1 and rows.tolist() == [[5], [3]]


def test_reset_goes_back_to_the_start():
    manager = make_manager(8, 3, "lfu")
    manager.step(torch.tensor([[5, 6]]))
    manager.reset()
    fresh = make_manager(8, 3, "lfu")
    assert manager.residency() == fresh.residency() == [0, 1, 2]
    assert manager.counters.as_dict() == fresh.counters.as_dict()
    assert manager.history.step == 0 and not manager.history.values().any()
    for name, slots in fresh.rows.slot_rows.items():
        assert torch.equal(manager.rows.slot_rows[name], slots)


def test_no_count_reaches_beyond_its_bits():
    """The longest half-life with an expert needed in every step: values stay below
    2^61."""
    with pytest.raises(ValidationError):
        MoEPrefetchConfig(slots=1, policy="lfu", lfu_half_life=MAX_HALF_LIFE + 1)
    history = ExpertHistory(1, "lfu", MAX_HALF_LIFE)
    history.frequency[:] = 2 * MAX_HALF_LIFE * FREQUENCY_UNIT - FREQUENCY_UNIT
    history.step = (1 << 32) - 2
    history.touch(np.array([True]))
    assert 0 < history.values()[0] < 1 << 61
