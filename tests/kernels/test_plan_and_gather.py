# SPDX-License-Identifier: Apache-2.0
"""The plan and gather kernels decide and copy as `reference.py` says, after every step."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm.model_executor.layers.fused_moe.expert_slots import device_slots
from vllm.model_executor.layers.fused_moe.expert_slots.config import (
    MoEPrefetchConfig,
    MoEPrefetchError,
)
from vllm.model_executor.layers.fused_moe.expert_slots.counters import TOTALS
from vllm.model_executor.layers.fused_moe.expert_slots.device_slots import DeviceSlotManager
from vllm.model_executor.layers.fused_moe.expert_slots.host_store import ExpertStore
from vllm.model_executor.layers.fused_moe.expert_slots.manager import ExpertSlotManager
from vllm.model_executor.layers.fused_moe.expert_slots.reference import StepPlan
from vllm.model_executor.layers.fused_moe.expert_slots.slots import SlotBuffers


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """The interpreter runs a launch's programs one after the other; two show the division."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_slots, "_GATHER_PROGRAMS", 2)
        yield


def make_store(experts: int, width: int = 8) -> ExpertStore:
    """Two tensors of different rows; every word names its expert and place."""
    w13 = torch.arange(experts * 3 * width, dtype=torch.int64).reshape(experts, 3, width)
    return ExpertStore({"w13_weight": w13, "w2_weight": -w13[:, 0].contiguous()})


def make_manager(cls, store: ExpertStore, slots: int, policy: str, half_life: int):
    parameters = {
        name: torch.nn.Parameter(t, requires_grad=False) for name, t in store.tensors.items()
    }
    buffers = SlotBuffers(parameters, store, slots, torch.device("cpu"))
    return cls(MoEPrefetchConfig(slots=slots, policy=policy, lfu_half_life=half_life), buffers)


class Pair:
    """The reference and the kernels, fed the same."""

    def __init__(self, experts: int, slots: int, policy: str, half_life: int = 4):
        store = make_store(experts)
        self.reference = make_manager(ExpertSlotManager, store, slots, policy, half_life)
        self.device = make_manager(DeviceSlotManager, store, slots, policy, half_life)

    def step(self, topk_ids: torch.Tensor, is_padding: torch.Tensor | None = None) -> None:
        asked = topk_ids
        if is_padding is not None:
            asked = topk_ids.masked_fill(is_padding[:, None], -1)
        before = self.reference.tables.slots_of_experts.clone()
        plan = self.reference.plan(asked)
        step = self.device.plan(topk_ids, is_padding)
        assert step.waves >= len(plan.wave_loads)
        for wave in range(step.waves):
            if wave <= len(plan.wave_loads):  # of the empty waves, one
                self.device.load(wave)
            self._check_wave(plan, before, asked, wave, step.wave_tables[wave])
        self.reference.buffers.load(plan.load_experts, plan.load_slots)
        self._check_state(plan)
        if step.waves == 1:
            table = torch.cat((step.wave_tables[0], torch.tensor([-1], dtype=torch.int32)))
            assert torch.equal(step.slot_ids, table[topk_ids.long()])
            real = asked >= 0
            assert torch.equal(step.slot_ids[real], self.reference.remap(asked)[real])

    def _check_wave(
        self, plan: StepPlan, before: torch.Tensor, asked: torch.Tensor, wave: int, table
    ) -> None:
        """The wave's table is the reference's, and its experts are in their slots now."""
        expected = torch.full_like(table, -1)
        if wave == 0 and plan.needed:
            needed = torch.unique(asked[asked >= 0]).long()
            hits = needed[before[needed] >= 0]
            expected[hits] = before[hits].int()
        waves = list(plan.waves())
        if wave < len(waves):
            experts, slots = waves[wave]
            expected[experts] = slots.int()
        assert torch.equal(table, expected)
        for expert in torch.nonzero(table >= 0).flatten().tolist():
            for name, home in self.device.store.tensors.items():
                assert torch.equal(self.device.buffers.tensors[name][table[expert]], home[expert])

    def _check_state(self, plan: StepPlan) -> None:
        reference, device = self.reference, self.device
        tables, history = reference.tables, reference.history
        assert torch.equal(device.slot_to_expert.long(), tables.slot_to_expert)
        assert torch.equal(device.expert_to_slot.long(), tables.slots_of_experts)
        assert torch.equal(device.last_needed, history.last_needed)
        assert torch.equal(device.frequency, history.frequency)
        assert device.head[:3].tolist() == [plan.needed, plan.hits, plan.misses]
        assert torch.equal(device.load_experts[: plan.misses].long(), plan.load_experts)
        assert torch.equal(device.load_slots[: plan.misses].long(), plan.load_slots)
        for name, slots in reference.buffers.tensors.items():
            assert torch.equal(device.buffers.tensors[name], slots)
        counted = reference.counters.as_dict()
        assert device.totals.tolist() == [counted[name] for name in TOTALS]
        assert device.counters.as_dict() == counted


def routing(generator: torch.Generator, tokens: int, experts: int, top_k: int, skew: float):
    """[tokens, top_k] distinct experts a token; `skew` 0 is uniform, more is ever more the same."""
    favour = torch.arange(experts, dtype=torch.float32).neg_().mul_(skew)
    noise = -torch.log(-torch.log(torch.rand(tokens, experts, generator=generator)))
    return (favour + noise).topk(top_k).indices.to(torch.int32)


@st.composite
def cases(draw):
    experts = draw(st.integers(2, 40))
    slots = draw(st.integers(1, experts - 1))
    top_k = draw(st.integers(1, min(4, slots)))
    return experts, slots, top_k, draw(st.sampled_from(["lru", "lfu"])), draw(st.integers(0, 999))


@settings(max_examples=40, deadline=None)
@given(cases())
def test_kernels_equal_the_reference(case):
    """Random sizes, skew and batches; some rows are padding, by id or by mask."""
    experts, slots, top_k, policy, seed = case
    pair = Pair(experts, slots, policy, half_life=3)
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    for _ in range(30):
        tokens = rng.choice([1, 1, 2, 3, 5, 9, 30])
        ids = routing(generator, tokens, experts, top_k, rng.choice([0.0, 0.05, 0.3]))
        ids[torch.rand(tokens, generator=generator) < 0.1] = -1
        masked = rng.random() < 0.5
        mask = torch.rand(tokens, generator=generator) < 0.2 if masked else None
        pair.step(ids, mask)


@pytest.mark.parametrize("policy", ["lru", "lfu"])
@pytest.mark.parametrize(("experts", "slots", "top_k"), [(128, 64, 8), (96, 40, 8), (60, 18, 4)])
def test_long_histories(experts, slots, top_k, policy):
    """Decode steps with a drifting favourite set, a prefill now and then."""
    pair = Pair(experts, slots, policy, half_life=64)
    generator = torch.Generator().manual_seed(slots)
    for step in range(1500):
        tokens = 40 if step % 150 == 149 else 1 + step % 4
        ids = routing(generator, tokens, experts, top_k, 0.1)
        pair.step((ids + step // 50) % experts)


def test_the_largest_sizes():
    """512 experts, 300 slots, top-16, and more ids than the kernel looks at together."""
    pair = Pair(512, 300, "lfu")
    generator = torch.Generator().manual_seed(1)
    for tokens in (1, 600, 4, 40):
        pair.step(routing(generator, tokens, 512, 16, 0.01))


def test_padding_alone_changes_nothing():
    """A captured graph warms up on padding rows: no load, no step, the tables as they were."""
    pair = Pair(16, 6, "lfu")
    ids = torch.arange(12, dtype=torch.int32).reshape(6, 2)
    pair.step(ids, torch.ones(6, dtype=torch.bool))
    assert pair.device.totals.tolist() == [0] * len(TOTALS)
    assert pair.device.slot_to_expert.tolist() == list(range(6))


def test_reset_goes_back_to_the_start():
    pair = Pair(16, 6, "lru")
    pair.step(torch.tensor([[9, 11]], dtype=torch.int32))
    pair.device.reset()
    fresh = Pair(16, 6, "lru").device
    for name in ("slot_to_expert", "expert_to_slot", "last_needed", "frequency", "totals"):
        assert torch.equal(getattr(pair.device, name), getattr(fresh, name))
    assert pair.device.counters.as_dict() == fresh.counters.as_dict()
    for name, slots in fresh.buffers.tensors.items():
        assert torch.equal(pair.device.buffers.tensors[name], slots)


def test_gather_copies_long_rows_whole():
    """Rows of several units and a rest; slots that nobody loads stay as they are."""
    store = make_store(8, width=5000)
    device = make_manager(DeviceSlotManager, store, 3, "lru", 4)
    device.plan(torch.tensor([[6]], dtype=torch.int32))
    device.load(0)
    assert device.slot_to_expert.tolist() == [6, 1, 2]
    for name, home in store.tensors.items():
        assert torch.equal(device.buffers.tensors[name], home[[6, 1, 2]])


def test_rows_that_are_no_whole_lanes_are_refused():
    store = ExpertStore({"w2_bias": torch.zeros(4, 3, dtype=torch.int16)})
    with pytest.raises(MoEPrefetchError, match=r"w2_bias.*6 bytes.*multiple of 16"):
        make_manager(DeviceSlotManager, store, 2, "lru", 4)
