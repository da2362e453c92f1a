# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The plan and gather kernels decide and copy as `decisions/step.py` says, after every
step."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.pair import Pair, make_rows, make_store, routing
from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchConfig
from vllm.model_executor.layers.fused_moe.expert_slots.counters import TOTALS
from vllm.model_executor.layers.fused_moe.expert_slots.cpu.memory import CPUMemory
from vllm.model_executor.layers.fused_moe.expert_slots.cuda import gather_kernel
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.manager import (
    CudaSlotManager,
)
from vllm.model_executor.layers.fused_moe.expert_slots.decisions.policy import Ranking


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """The interpreter runs a launch's programs one after the other; two show the
    division."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gather_kernel, "PROGRAMS", 2)
        yield


@st.composite
def cases(draw):
    experts = draw(st.integers(2, 40))
    slots = draw(st.integers(1, experts - 1))
    top_k = draw(st.integers(1, min(4, slots)))
    return (
        experts,
        slots,
        top_k,
        draw(st.sampled_from(["lru", "lfu"])),
        draw(st.integers(0, 999)),
    )


@settings(max_examples=40, deadline=None)
@given(cases())
def test_kernels_equal_the_reference(case):
    """Random sizes, skew and batches; some rows are padding, by id or by mask; ids of
    both widths; some ranks hold a part of the model's experts."""
    experts, slots, top_k, policy, seed = case
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    expert_map = None
    model = experts
    if seed % 3 == 0:
        model = 2 * experts + seed % 5
        expert_map = torch.full((model,), -1, dtype=torch.int32)
        here = torch.randperm(model, generator=generator)[:experts]
        expert_map[here] = torch.arange(experts, dtype=torch.int32)
    pair = Pair(experts, slots, policy, 3, expert_map=expert_map, traced=bool(seed % 4))
    dtype = torch.int64 if seed % 2 else torch.int32
    for _ in range(30):
        tokens = rng.choice([1, 1, 2, 3, 5, 9, 50])
        ids = routing(generator, tokens, model, top_k, rng.choice([0.0, 0.05, 0.3]))
        ids[torch.rand(tokens, generator=generator) < 0.1] = -1
        masked = rng.random() < 0.5
        mask = torch.rand(tokens, generator=generator) < 0.2 if masked else None
        pair.step(ids.to(dtype), mask)


@pytest.mark.parametrize("policy", ["lru", "lfu"])
@pytest.mark.parametrize(
    ("experts", "slots", "top_k"), [(128, 64, 8), (96, 40, 8), (60, 18, 4)]
)
def test_long_histories(experts, slots, top_k, policy):
    """Decode steps with a drifting favourite set, a prefill now and then."""
    pair = Pair(experts, slots, policy, half_life=64)
    generator = torch.Generator().manual_seed(slots)
    for step in range(1000):
        prefill = step % 150 == 149
        tokens, skew = (40, 0.0) if prefill else (1 + step % 4, 0.1)
        ids = routing(generator, tokens, experts, top_k, skew)
        pair.step((ids + step // 50) % experts)
    assert pair.device.counters.staged_steps > 0


@pytest.mark.parametrize("slots", [16, 300, 511])
def test_the_largest_sizes(slots):
    """512 experts, top-16, and more ids than the kernel looks at together."""
    pair = Pair(512, slots, "lfu")
    generator = torch.Generator().manual_seed(1)
    for tokens in (1, 600, 4, 40):
        pair.step(routing(generator, tokens, 512, 16, 0.01))


def test_padding_alone_changes_nothing():
    """A captured graph warms up on padding rows: no load, no step, the tables as they
    were."""
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
    for name in (
        *("slot_to_expert", "expert_to_slot", "expert_to_row"),
        *("last_needed", "frequency", "totals"),
    ):
        assert torch.equal(getattr(pair.device, name), getattr(fresh, name))
    assert pair.device.counters.as_dict() == fresh.counters.as_dict()
    for name, slots in fresh.rows.slot_rows.items():
        assert torch.equal(pair.device.rows.slot_rows[name], slots)


@settings(max_examples=15, deadline=None)
@given(cases(), st.data())
def test_a_warm_start_equals_the_references(case, data):
    """Tables, history, slots and every later step, whatever N and policy the residents
    were of."""
    experts, slots, top_k, policy, seed = case
    residents = data.draw(st.lists(st.integers(0, experts - 1), unique=True))
    counts = data.draw(
        st.lists(st.integers(0, 1 << 20), min_size=experts, max_size=experts)
    )
    pair = Pair(experts, slots, policy, half_life=3)
    generator = torch.Generator().manual_seed(seed)
    pair.step(routing(generator, 3, experts, top_k, 0.1))
    pair.reset(Ranking(residents, counts[: len(residents)]))
    assert set(pair.device.residency()) >= set(residents[:slots])
    for tokens in (1, 1, 2, 9, 1, 3, 1, 1):
        pair.step(routing(generator, tokens, experts, top_k, 0.1))


def test_gather_copies_rows_of_any_length_whole():
    """Rows of several units and a rest; rows that nothing is loaded into stay as they
    are."""
    store = make_store(8, width=5000)
    device = CudaSlotManager(
        MoEPrefetchConfig(slots=3), make_rows(store, 3, CPUMemory())
    )
    staging = {name: t[:5].clone() for name, t in device.rows.tensors.items()}
    device.step(torch.tensor([[6]], dtype=torch.int32))
    assert device.slot_to_expert.tolist() == [6, 1, 2]
    for name, home in store.tensors.items():
        assert torch.equal(device.rows.slot_rows[name], home[[6, 1, 2]])
        assert torch.equal(device.rows.tensors[name][:5], staging[name])


def test_the_longest_half_life_evicts_nothing_that_a_step_needs():
    """Counts of the highest frequency stay below what marks the least valuable."""
    from vllm.model_executor.layers.fused_moe.expert_slots.decisions.policy import (
        FREQUENCY_UNIT,
        MAX_HALF_LIFE,
    )

    pair = Pair(8, 4, "lfu", half_life=MAX_HALF_LIFE)
    highest = 2 * MAX_HALF_LIFE * FREQUENCY_UNIT
    pair.device.frequency[:4] = highest
    pair.reference.history.frequency[:4] = highest
    for experts in ([0, 1, 6], [2, 6, 7], [0, 1, 2, 5], [0, 1, 2, 3, 4, 5]):
        pair.step(torch.tensor([experts], dtype=torch.int32))
