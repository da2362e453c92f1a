# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The replay that compares rules of eviction and admission."""

import numpy as np
import pytest

from benchmarks.policies.__main__ import RULES, applies, ratios
from benchmarks.policies.replay import Needs, Rule, loads
from benchmarks.policies.workloads import LENGTH, PROMPT, WIDE, decoding, serving
from tests.benchmarks.test_bench import printed
from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchConfig
from vllm.model_executor.layers.fused_moe.expert_slots.decisions.policy import (
    ExpertHistory,
)
from vllm.model_executor.layers.fused_moe.expert_slots.decisions.step import (
    ResidencyTables,
    plan_step,
)

A, B, C, D = range(4)


def sets(*steps: tuple[int, ...], experts: int = 8) -> Needs:
    return Needs.of([np.array(step)[:, None] for step in steps], experts)


@pytest.mark.parametrize("policy", ["lru", "lfu"])
@pytest.mark.parametrize("slots", [1, 2, 15, 40, 59])
def test_lru_and_lfu_are_the_engines(policy, slots):
    """Step by step, in wide steps and in steps that need more than the slots too."""
    random = np.random.default_rng(slots)
    steps = [
        (random.exponential(15, (tokens, 4)) % 60).astype(int)
        for tokens in random.choice([1, 2, 8, 32, 100], 300)
    ]
    tables = ResidencyTables(60, slots)
    history = ExpertHistory(60, policy, lfu_half_life=8)
    expected = [plan_step(tables, history, ids).misses for ids in steps]
    assert MoEPrefetchConfig(slots=1).lfu_half_life == 8
    rule = Rule(policy)  # as the engine is by default
    assert loads(Needs.of(steps, 60), slots, rule).tolist() == expected


def test_orders():
    """Two slots begin with A and B."""
    # The two last needed are kept.
    assert loads(sets((A,), (C,), (A,), (B,)), 2, Rule()).tolist() == [0, 1, 0, 1]
    # A was needed twice, so C leaves before it.
    needs = sets((A,), (A,), (C,), (D,), (A,))
    assert loads(needs, 2, Rule("slru")).tolist() == [0, 0, 1, 1, 0]
    assert loads(needs, 2, Rule("lfu")).tolist() == [0, 0, 1, 1, 0]
    # Of A and C, C has no need before the last.
    needs = sets((B,), (A,), (A,), (C,), (D,), (A,))
    assert loads(needs, 2, Rule("lru2")).tolist() == [0, 0, 0, 1, 1, 0]
    # A is needed next, so B leaves, though it was needed last.
    needs = sets((A,), (B,), (C,), (A,), (C,))
    assert loads(needs, 2, Rule("belady")).tolist() == [0, 0, 1, 0, 0]
    # Nothing needs C again, so it gets no slot.
    needs = sets((C,), (A,), (B,))
    assert loads(needs, 2, Rule("belady")).tolist() == [1, 0, 0]
    assert loads(needs, 2, Rule("belady"), empty=True).tolist() == [1, 1, 1]


def test_admission():
    twice = Rule(admission="twice")
    assert loads(sets((C,), (C,), (C,)), 2, twice).tolist() == [1, 1, 0]
    late = sets((C,), (A,), (A,), (A,), (C,), (C,))
    assert loads(late, 2, twice).tolist() == [1, 0, 0, 0, 1, 0]
    later = sets((C,), (A,), (A,), (A,), (A,), (C,), (C,))
    assert loads(later, 2, twice).tolist() == [1, 0, 0, 0, 0, 1, 1]
    worth = Rule("lfu", admission="worth")
    needs = sets((A, B), (A, B), (C,), (C,), (C,), (C,))
    assert loads(needs, 2, worth).tolist() == [0, 0, 1, 1, 0, 0]


def test_wide_steps():
    """Sixty-five tokens are a prefill. Two slots begin with A and B."""

    def found(steps: list[np.ndarray], **rule) -> list[int]:
        return loads(Needs.of(steps, 8, 64), 2, Rule(**rule)).tolist()

    one = [np.array([[expert]]) for expert in range(4)]
    # B and D are in the slots, and only the first token needs D.
    prefill = np.array([[D, B]] + [[B, C]] * 64)
    steps = [one[D], prefill, one[A], one[B]]
    assert found(steps) == [1, 1, 1, 1]
    assert found(steps, wide_touches="tail") == [1, 1, 1, 0]
    assert found(steps, wide_touches="none") == [1, 1, 1, 1]
    # C takes a slot, or does not.
    steps = [one[A], np.array([[C]] * 65), one[B], one[C]]
    assert found(steps) == [0, 1, 1, 0]
    assert found(steps, wide_touches="none", wide_places=False) == [0, 1, 0, 1]


def test_workloads():
    decode, serve = (kind("topics-qwen3", 8, 256, 0) for kind in (decoding, serving))
    assert len(decode.wide) == len(serve.wide) == 256 and not decode.wide.any()
    # Each lane begins a sequence, with a prefill, every LENGTH steps.
    assert serve.wide.sum() == 8 * 256 // LENGTH and PROMPT > WIDE
    assert serve.sizes[serve.wide].min() > serve.sizes[~serve.wide].mean()
    found = ratios([serve])
    assert set(found["lru"]["E/4"]) == {1.0} and found.keys() == RULES.keys()
    best = min(RULES, key=lambda name: found[name]["E/4"])
    assert best.startswith("belady")
    assert applies(RULES["lru, prefill only reads"], [serve])
    assert not applies(RULES["lru, prefill only reads"], [decode])


def test_the_command():
    output = printed("benchmarks.policies", "--steps", "64", "--seeds", "1")
    assert output.count("half-life 128") == 2 * 2 * 3 + 1
