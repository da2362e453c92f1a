# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Replays needed sets under a rule of eviction and of admission, and counts loads.

Under `lru` and `lfu` without rules the replay is `decisions.step.plan_step` to the
load; a test holds it to that.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numba
import numpy as np

from vllm.model_executor.layers.fused_moe.expert_slots.decisions.policy import (
    FREQUENCY_UNIT,
)

ORDERS = ("lru", "lfu", "lru2", "slru", "belady")
ADMISSIONS = ("always", "twice", "worth")
TOUCHES = ("all", "tail", "none")

TAIL = 32
"""Tokens of a wide step, its last, that touch under the rule `tail`."""

_NEVER = 1 << 59
_PROTECTED = 1 << 40


@dataclass(frozen=True)
class Rule:
    """How slots are given away.

    Attributes:
        order: what a resident is worth. `lru` and `lfu` are the engine's. `lru2`: the
            step of the last need but one. `slru`: a resident that is hit becomes
            protected, and protected ones leave after all others. `belady`: the step of
            the next need, which no engine knows; among equals of the need after it.
        half_life: of the counts of `lfu`, in steps.
        protected: of the slots, the largest part that `slru` protects.
        admission: which misses may get a slot. `twice`: those that one of the last
            four steps needed too. `worth`: those that after the step are worth more
            than the resident that would leave; for `lfu`.
        wide_touches: which needs of wide steps count for the worth of experts: `all`,
            those of the last `TAIL` tokens, or `none`.
        wide_places: whether the misses of wide steps get slots.
    """

    order: str = "lru"
    half_life: int = 8  # the engine's default
    protected: float = 0.5
    admission: str = "always"
    wide_touches: str = "all"
    wide_places: bool = True


@dataclass(frozen=True)
class Needs:
    """The needed sets of one layer.

    Attributes:
        num_experts: E.
        offsets: [steps + 1] int64.
        experts: [offsets[-1]] int16; step i needs `experts[offsets[i]:offsets[i + 1]]`,
            ascending.
        wide: [steps] bool, the steps with so many tokens that they are a prefill.
        tail: like `experts`, bool: whether one of the step's last `TAIL` tokens needs
            it. None: not known.
    """

    num_experts: int
    offsets: np.ndarray
    experts: np.ndarray
    wide: np.ndarray
    tail: np.ndarray | None = None

    @classmethod
    def of(
        cls,
        steps: Sequence[np.ndarray] | np.ndarray,
        num_experts: int,
        wide_tokens: int = 64,
    ) -> "Needs":
        """Of the ids of each step, [tokens, top_k]. A step of more than `wide_tokens`
        tokens is wide."""
        needed: np.ndarray = np.zeros((len(steps), num_experts), np.bool_)
        tail = needed.copy()
        for step, ids in enumerate(steps):
            needed[step, ids.ravel()] = True
            tail[step, ids[-TAIL:].ravel()] = True
        offsets = np.concatenate(([0], np.cumsum(needed.sum(1))))
        wide = np.array([len(ids) > wide_tokens for ids in steps])
        experts = needed.nonzero()[1].astype(np.int16)
        return cls(num_experts, offsets, experts, wide, tail[needed])

    @property
    def sizes(self) -> np.ndarray:
        """[steps] int64, how many experts each step needs."""
        return np.diff(self.offsets)


def loads(needs: Needs, num_slots: int, rule: Rule, empty: bool = False) -> np.ndarray:
    """[steps] int64, the loads of each step. The slots begin with experts 0 ... N-1.

    Args:
        empty: they begin with nothing, which no engine does but published simulations
            do.
    """
    resident = np.arange(needs.num_experts) < num_slots
    if empty:  # experts that no step needs
        resident = np.arange(needs.num_experts + num_slots) >= needs.num_experts
    return _loads(
        needs.offsets,
        needs.experts,
        needs.wide,
        needs.tail if needs.tail is not None else np.ones(len(needs.experts), bool),
        _next_needs(needs.offsets, needs.experts, len(resident)),
        resident,
        num_slots,
        ORDERS.index(rule.order),
        rule.half_life,
        int(rule.protected * num_slots),
        ADMISSIONS.index(rule.admission),
        TOUCHES.index(rule.wide_touches),
        rule.wide_places,
    )


@numba.njit(cache=True)
def _next_needs(offsets, experts, num_experts):
    """For each entry of `experts`, the step of its expert's next need, and among equals
    of the need after it: step << 30 + step."""
    following = np.full(num_experts, _NEVER, np.int64)
    result = np.empty(len(experts), np.int64)
    for step in range(len(offsets) - 2, -1, -1):
        for i in range(offsets[step], offsets[step + 1]):
            result[i] = following[experts[i]]
            following[experts[i]] = (step << 30) + (following[experts[i]] >> 30)
    return result


@numba.njit(cache=True)
def _loads(
    offsets,
    experts,
    wide,
    tail,
    next_needs,
    resident,
    num_slots,
    order,
    half_life,
    most_protected,
    admission,
    wide_touches,
    wide_places,
):
    num_experts = len(resident)
    last = np.zeros(num_experts, np.int64)
    before = np.zeros(num_experts, np.int64)  # the last need but one
    count = np.zeros(num_experts, np.int64)
    following = np.full(num_experts, _NEVER, np.int64)
    protected = np.zeros(num_experts, np.bool_)
    result = np.zeros(len(offsets) - 1, np.int64)
    clock = 0
    for step in range(len(offsets) - 1):
        needed = experts[offsets[step] : offsets[step + 1]].astype(np.int64)
        is_needed = np.zeros(num_experts, np.bool_)
        is_needed[needed] = True
        hits = needed[resident[needed]]
        misses = needed[~resident[needed]]
        free = num_slots - len(hits)
        result[step] = len(misses)
        touched = needed
        if wide[step] and wide_touches == 1:
            touched = needed[tail[offsets[step] : offsets[step + 1]]]
        elif wide[step] and wide_touches == 2:
            touched = needed[:0]
        if order == 4:
            for i in range(offsets[step], offsets[step + 1]):
                following[experts[i]] = next_needs[i]

        if len(misses) and free and (wide_places or not wide[step]):
            if order == 0:
                value = last.copy()
            elif order == 1:
                value = (count << 32) + last
            elif order == 2:
                value = (before << 30) + last
            elif order == 3:
                value = last + protected * _PROTECTED
            else:
                value = -following
            if admission == 1:
                misses = misses[(last[misses] > 0) & (clock + 1 - last[misses] <= 4)]
            for _ in range(min(free, len(misses))):
                enters, leaves = -1, -1
                for expert in misses:
                    if not resident[expert] and (
                        enters < 0 or value[expert] > value[enters]
                    ):
                        enters = expert
                for expert in range(num_experts):
                    if (
                        resident[expert]
                        and not is_needed[expert]
                        and (leaves < 0 or value[expert] < value[leaves])
                    ):
                        leaves = expert
                worth = value[enters]
                if admission == 2:
                    worth += FREQUENCY_UNIT << 32
                if (order == 4 or admission == 2) and worth <= value[leaves]:
                    break
                resident[leaves] = False
                protected[leaves] = False
                resident[enters] = True
        if len(touched):
            clock += 1
            if clock % half_life == 0:
                count >>= 1
            for expert in touched:
                before[expert] = last[expert]
                last[expert] = clock
                count[expert] += FREQUENCY_UNIT
            if order == 3:
                protected[hits] = True
                for _ in range(np.sum(protected) - most_protected):
                    oldest = -1
                    for expert in range(num_experts):
                        if protected[expert] and (
                            oldest < 0 or last[expert] < last[oldest]
                        ):
                            oldest = expert
                    protected[oldest] = False
    return result
