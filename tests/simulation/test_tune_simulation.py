# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The simulation of `vllm-moe-prefetch tune` counts what the engine counts, for every
routing, number of slots and policy; and no schedule loads less than its Belady."""

import sys
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.cpu import tune
from tests.support.traces import counted, layer_of
from vllm.model_executor.layers.fused_moe.expert_slots.decisions.policy import Ranking
from vllm.plugins.moe_gpu_prefetch.command.tune import kernels
from vllm.plugins.moe_gpu_prefetch.command.tune.simulate import (
    Point,
    SimulatedLayer,
    simulate,
    totals,
)
from vllm.plugins.moe_gpu_prefetch.command.tune.steps import DECODE, PREFILL, kinds_of


def simulated(layer, slots: int, policy: str) -> dict[str, int]:
    """What the simulation counts."""
    each = SimulatedLayer(layer, np.zeros(len(layer.steps), np.int8))
    counts = simulate([each], [Point(slots, policy)])
    return totals(counts, layer.bytes_per_expert)


@st.composite
def layers(draw, most_experts=24, most_steps=40):
    """Sets from one expert to all, recorded from a start with or without a history."""
    num_experts = draw(st.integers(2, most_experts))
    # Some experts are needed more often, so that ties and hits are frequent.
    favoured = st.integers(0, max(1, num_experts // 3) - 1)
    expert = st.one_of(favoured, st.integers(0, num_experts - 1))
    few, many = (
        st.sets(expert, min_size=1, max_size=most)
        for most in (min(4, num_experts), num_experts)
    )
    sets = draw(st.lists(st.one_of(few, few, many), max_size=most_steps))
    start = None
    if draw(st.booleans()):
        order = draw(st.permutations(range(num_experts)))
        residents = order[: draw(st.integers(1, num_experts))]
        counts = [draw(st.sampled_from([0, 1, 512, 1024, 9000])) for _ in residents]
        start = Ranking(list(residents), counts)
    half_life = draw(st.integers(1, 6))
    return layer_of(sets, num_experts, 1, start=start, lfu_half_life=half_life)


@settings(max_examples=200, deadline=None)
@given(layers(), st.sampled_from(["lru", "lfu"]), st.data())
def test_all_totals_are_those_of_the_engine(layer, policy, data):
    """Also those that overflow, stage, or have a slot for every expert."""
    slots = data.draw(st.integers(1, layer.num_experts))
    assert simulated(layer, slots, policy) == counted(layer, slots, policy)


def fewest_loads(sets, num_experts: int, slots: int) -> int:
    """By trying all: whatever a step may leave in the slots."""
    loads = {frozenset(range(slots)): 0}
    for needed in map(frozenset, sets):
        after: dict[frozenset[int], int] = {}
        for residents, so_far in loads.items():
            stay, others = (
                residents & needed,
                (residents | needed) - (residents & needed),
            )
            total = so_far + len(needed - residents)
            for rest in combinations(sorted(others), slots - len(stay)):
                state = stay | frozenset(rest)
                after[state] = min(total, after.get(state, total))
        loads = after
    return min(loads.values())


@settings(max_examples=100, deadline=None)
@given(layers(most_experts=6, most_steps=9), st.data())
def test_belady_loads_the_fewest(layer, data):
    """As many as the best of all schedules that keep the engine's rules: a step loads
    what it needs and misses, and a needed expert stays in its slot."""
    slots = data.draw(st.integers(1, layer.num_experts))
    layer = layer_of(sets_of(layer), layer.num_experts, slots)
    found = simulated(layer, slots, "belady")
    assert found["loads"] == fewest_loads(sets_of(layer), layer.num_experts, slots)
    assert found["staged"] + found["evictions"] == found["loads"]
    for policy in ("lru", "lfu"):
        assert found["loads"] <= simulated(layer, slots, policy)["loads"]


def sets_of(layer) -> list[list[int]]:
    return [part.tolist() for part in np.split(layer.experts, layer.offsets[1:-1])][
        : len(layer.steps)
    ]


@settings(max_examples=50, deadline=None)
@given(layers())
def test_reuse_distances(layer):
    """The distinct experts of the steps between two needs, counted one by one."""
    sets = sets_of(layer)
    expected = [0] * layer.num_experts
    for step, needed in enumerate(sets):
        for expert in needed:
            before = [at for at in range(step) if expert in sets[at]]
            if before:
                between = sets[before[-1] + 1 : step]
                expected[len(set().union(*between))] += 1
    found = SimulatedLayer(layer, np.zeros(len(layer.steps), np.int8)).reuse()
    assert found.tolist() == expected


def test_kinds_are_counted_apart():
    """Each step in the row of its kind."""
    layer = layer_of([[0, 1], [2], [3, 4]], 6, 2)
    each = SimulatedLayer(layer, np.array([1, 0, 1], np.int8))
    (decode, prefill), *_ = simulate([each], [Point(2, "lru")])[0]
    assert decode.tolist() == [1, 1, 0, 0, 0, 0]
    assert prefill.tolist() == [2, 4, 2, 0, 0, 0]


def test_counts_decay_over_missing_steps():
    """The steps that a trace has lost still pass."""
    layer = layer_of([[0]] * 9 + [[1], [2]], 3, 1, lfu_half_life=2)
    late = replace(layer, steps=np.array([*range(1, 10), 90, 91]))
    assert simulated(layer, 1, "lfu")["evictions"] == 2
    assert simulated(late, 1, "lfu")["loads"] == 2


@pytest.mark.parametrize("slots", [1, 3])
def test_fewer_slots_than_top_k_are_raised(slots):
    """As the engine raises them."""
    layer = layer_of([[0, 1, 2], [3, 4, 5]], 8, 3, top_k=3)
    assert simulated(layer, slots, "lru") == counted(layer, 3, "lru")


def kinds(tokens, max_num_seqs: int = 256) -> list[int]:
    layer = layer_of([[0]] * len(tokens), 2, 1, tokens)
    return kinds_of(layer, max_num_seqs).tolist()


def test_decode_steps_are_told_from_prompts():
    """By their tokens alone, also where prompts are shorter than `max_num_seqs`."""
    D, P = DECODE, PREFILL
    assert kinds([120, 1, 1, 1, 90, 1, 1]) == [P, D, D, D, P, D, D]
    # A prompt joins a batch of three; two sequences end.
    assert kinds([30, 3, 3, 43, 4, 4, 2, 2]) == [P, D, D, P, D, D, D, D]
    # Two prompts one after the other, and the last part of a long one.
    assert kinds([200, 151, 2, 2]) == [P, P, D, D]
    assert kinds([8192, 8192, 150, 1, 1]) == [P, P, P, D, D]
    # More than `max_num_seqs` tokens, of whatever.
    assert kinds([9, 8, 8, 8], max_num_seqs=7) == [P, P, P, P]
    assert kinds([]) == []


def test_decode_steps_under_expert_parallelism():
    """A token needs 4 experts of this rank on average, sometimes 1, sometimes 8."""
    random = np.random.default_rng(0)
    tokens = [150, *[4] * 60, 130, *[5] * 60]
    rows = random.binomial(8 * np.array(tokens), 0.5)
    layer = layer_of([[0]] * len(tokens), 2, 1, tokens, top_k=8, routed=4.0)
    found = kinds_of(replace(layer, rows=rows), 256)
    assert found.nonzero()[0].tolist() == [0, 61]


def test_the_loops_run_where_nothing_can_be_kept(monkeypatch):
    """Neither in the package's directory nor in the user's: they are compiled for this
    process alone."""
    from numba.core.caching import CacheImpl

    monkeypatch.setattr(CacheImpl, "_locator_classes", [])
    double = kernels.compiled(lambda value: 2 * value)
    assert double(4) == 8 and double.stats.cache_path is None


def test_the_benchmark(monkeypatch, capsys):
    """Small, and with the loops compiled before. Its figures are not tested."""
    monkeypatch.setattr(sys, "argv", ["tune", "--entries", "2000"])
    tune.main()
    printed = capsys.readouterr().out
    assert printed.count("│ uniform │") == printed.count("│ skewed  │") == 2
