# SPDX-License-Identifier: Apache-2.0
"""The manager's invariants hold for every routing, slot count and policy."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchConfig
from vllm.model_executor.layers.fused_moe.expert_slots.host_store import ExpertStore
from vllm.model_executor.layers.fused_moe.expert_slots.manager import ExpertSlotManager
from vllm.model_executor.layers.fused_moe.expert_slots.slots import SlotBuffers


def make_manager(
    num_experts: int, num_slots: int, policy: str, half_life: int = 4
) -> ExpertSlotManager:
    rows = torch.arange(num_experts * 6, dtype=torch.float32).reshape(num_experts, 2, 3)
    store = ExpertStore({"w13_weight": rows, "w2_weight": -rows[:, 0]})
    parameters = {
        name: torch.nn.Parameter(t, requires_grad=False) for name, t in store.tensors.items()
    }
    buffers = SlotBuffers(parameters, store, num_slots, torch.device("cpu"))
    config = MoEPrefetchConfig(slots=num_slots, policy=policy, lfu_half_life=half_life)
    return ExpertSlotManager(config, buffers)


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


def assert_consistent(manager: ExpertSlotManager) -> None:
    tables = manager.tables
    assert tables.expert_to_slot[-1] == -1
    for slot, expert in enumerate(tables.slot_to_expert.tolist()):
        assert tables.expert_to_slot[expert] == slot
        for name, master in manager.store.tensors.items():
            assert torch.equal(manager.buffers.tensors[name][slot], master[expert])
    resident = (tables.expert_to_slot >= 0).sum()
    assert resident == manager.num_slots


@settings(max_examples=150, deadline=None)
@given(routings())
def test_every_step_keeps_the_invariants(case):
    num_experts, num_slots, policy, steps = case
    manager, twin = (make_manager(num_experts, num_slots, policy) for _ in range(2))
    for rows in steps:
        topk_ids = torch.tensor(rows, dtype=torch.int32)
        needed = set(topk_ids.flatten().tolist()) - {-1}
        slot_before = {e: s for s, e in enumerate(manager.tables.slot_to_expert.tolist())}
        resident = set(slot_before)
        before = manager.counters.loads
        plan = manager.plan(topk_ids)
        hits = needed & resident
        served, loaded = set(hits), []
        for wave, (experts, slots) in enumerate(plan.waves()):
            manager.buffers.load(experts, slots)
            # A slot takes one expert of a wave; what the wave computes holds its own rows.
            assert len(set(slots.tolist())) == len(slots)
            computed = dict(zip(experts.tolist(), slots.tolist(), strict=True))
            if wave == 0:
                computed |= {expert: slot_before[expert] for expert in hits}
            assert len(set(computed.values())) == len(computed)
            for expert, slot in computed.items():
                for name, master in manager.store.tensors.items():
                    assert torch.equal(manager.buffers.tensors[name][slot], master[expert])
            served |= set(computed)
            loaded += experts.tolist()
        assert served == needed
        assert sorted(loaded) == sorted(needed - resident)  # each missing expert exactly once
        assert plan.hits == len(needed & resident)
        assert plan.overflow == (len(needed) > num_slots)
        assert manager.counters.loads - before == len(loaded)
        assert_consistent(manager)
        replay = twin.plan(topk_ids)
        assert torch.equal(twin.tables.slot_to_expert, manager.tables.slot_to_expert)
        assert replay.wave_loads == plan.wave_loads
        assert torch.equal(replay.load_slots, plan.load_slots)
        if not plan.overflow:
            remapped = manager.remap(topk_ids)
            assert torch.equal(remapped < 0, topk_ids < 0)
    counters = manager.counters
    assert counters.hits + counters.misses == counters.needed
    assert counters.misses == counters.loads
    assert counters.bytes_loaded == counters.loads * manager.store.bytes_per_expert


def test_lru_evicts_the_expert_needed_longest_ago():
    manager = make_manager(6, 3, "lru")
    for expert in (0, 1, 2, 0):
        manager.plan(torch.tensor([[expert]]))
    manager.plan(torch.tensor([[5]]))
    assert sorted(manager.tables.slot_to_expert.tolist()) == [0, 2, 5]


def test_lfu_evicts_the_expert_needed_least_often():
    manager = make_manager(6, 3, "lfu", half_life=64)
    for expert in (0, 0, 1, 1, 2):
        manager.plan(torch.tensor([[expert]]))
    manager.plan(torch.tensor([[5]]))
    assert sorted(manager.tables.slot_to_expert.tolist()) == [0, 1, 5]


def test_overflow_keeps_the_hot_set():
    manager = make_manager(64, 16, "lru")
    manager.plan(torch.arange(64).reshape(16, 4))
    kept = set(manager.tables.slot_to_expert.tolist()) & set(range(16))
    assert len(kept) >= 12  # the ring is a quarter of the slots
