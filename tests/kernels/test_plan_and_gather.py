# SPDX-License-Identifier: Apache-2.0
"""The plan and gather kernels decide and copy as `reference.py` says, after every step."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pair import Pair, make_manager, make_store, routing

from vllm.model_executor.layers.fused_moe.expert_slots import device_slots
from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError
from vllm.model_executor.layers.fused_moe.expert_slots.counters import TOTALS
from vllm.model_executor.layers.fused_moe.expert_slots.device_slots import DeviceSlotManager
from vllm.model_executor.layers.fused_moe.expert_slots.host_store import ExpertStore


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """The interpreter runs a launch's programs one after the other; two show the division."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_slots, "_GATHER_PROGRAMS", 2)
        yield


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
