# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The compiled loops of the simulation.

`run_policy` makes the decisions of `decisions/step.py: plan_step`, without rows and
without one array for each step. Tests hold the two together.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

from vllm.model_executor.layers.fused_moe.expert_slots.decisions.policy import (
    FREQUENCY_UNIT,
)

LRU, LFU, BELADY = 0, 1, 2
_NEEDED = 1 << 62  # worth more than any value, so not evicted

COUNTED = ("steps", "needed", "hits", "staged", "staged_steps", "overflow_steps")
"""What `run_policy` counts, by the names of `counters.TOTALS`. The other totals follow
from these."""


def compiled(function: Callable[..., Any]) -> Any:
    """Compiles at the first call, for later processes too. Threads run it side by
    side."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither this directory nor the user's cache can be written
        return njit(nogil=True)(function)


@compiled
def _before(worth, one, other):
    """Whether `one` is evicted before `other`."""
    return worth[one] < worth[other] or (worth[one] == worth[other] and one < other)


@compiled
def _down(heap, places, worth, place):
    """Moves the expert at `place` behind those that are evicted before it."""
    expert = heap[place]
    while 2 * place + 1 < len(heap):
        child = 2 * place + 1
        if child + 1 < len(heap) and _before(worth, heap[child + 1], heap[child]):
            child += 1
        if _before(worth, expert, heap[child]):
            break
        heap[place] = heap[child]
        places[heap[place]] = place
        place = child
    heap[place] = expert
    places[expert] = place


@compiled
def _up(heap, places, worth, place):
    """Moves the expert at `place` in front of those that are evicted after it."""
    expert = heap[place]
    while place > 0 and _before(worth, expert, heap[(place - 1) // 2]):
        heap[place] = heap[(place - 1) // 2]
        places[heap[place]] = place
        place = (place - 1) // 2
    heap[place] = expert
    places[expert] = place


@compiled
def _heapify(heap, places, worth):
    for place in range(len(heap) // 2 - 1, -1, -1):
        _down(heap, places, worth, place)


@compiled
def later_needs(experts, offsets, later, first):
    """Finds when each expert is needed next.

    The answer is a place: `offsets` of the next step that needs the expert, plus its
    rank among the experts of that step by the place after that. So of two experts
    whose next needs are in the same step, the one that is needed again sooner has the
    lower place. An expert that is not needed again has the place `needed`, behind all.

    Args:
        experts: [needed] int16.
        offsets: [n + 1] int64.
        later: [needed] int32, filled: the place after each need.
        first: [E] int32, filled: the place of each expert's first need.
    """
    first[:] = len(experts)
    ranked = np.empty(len(first), np.int64)
    for step in range(len(offsets) - 2, -1, -1):
        begin, end = offsets[step], offsets[step + 1]
        for at in range(begin, end):
            later[at] = first[experts[at]]
            rank = at - begin
            while rank > 0 and later[ranked[rank - 1]] > later[at]:
                ranked[rank] = ranked[rank - 1]
                rank -= 1
            ranked[rank] = at
        for rank in range(end - begin):
            first[experts[ranked[rank]]] = begin + rank


@compiled
def _sort_by_worth(experts, size, worth):
    """Sorts the first `size` of `experts`, [E] int64: the most worth first, of equals
    the lower id. They come with ascending ids."""
    for end in range(1, size):
        at, expert = end, experts[end]
        while at > 0 and worth[experts[at - 1]] < worth[expert]:
            experts[at] = experts[at - 1]
            at -= 1
        experts[at] = expert


@compiled
def run_policy(
    experts, offsets, numbers, kinds, later, first,
    policy, half_life, residents, last, frequency, counts,
):  # fmt: skip
    """Runs all steps of a layer.

    `BELADY` knows the steps to come. Its experts are worth more the sooner they are
    needed, and it stages a miss that no resident is needed later than. This loads the
    fewest experts that these rules allow: a step loads what it needs and misses, and a
    hit stays in its slot. Proof: take two states of the slots that differ in one
    expert. Whatever the state with the expert that is needed later does, the other can
    imitate with no more loads: it gains a load at the sooner need, and loses at most
    one afterwards. If both are needed in the same step, each state loads the other's
    expert, and the needs after that step decide.

    Args:
        experts: [needed] int16, ascending within a step.
        offsets: [n + 1] int64.
        numbers: [n] int64, the number of each step.
        kinds: [n] int8, the row of `counts` that counts the step.
        later: [needed] int32, as `later_needs` fills it.
        first: [E] int32, as `later_needs` fills it.
        policy: `LRU`, `LFU` or `BELADY`.
        half_life: of `LFU`, in steps.
        residents: [N] int64, the experts in slots at the start; changed to those of
            the end.
        last: [E] int64, `ExpertHistory.last_needed` at the start; changed.
        frequency: [E] int64, `ExpertHistory.frequency` at the start; changed.
        counts: [kinds, len(COUNTED)] int64, added to.
    """
    num_experts, num_slots = len(last), len(residents)
    worth = last.copy()
    if policy == LFU:
        worth += frequency << 32
    elif policy == BELADY:
        for expert in range(num_experts):
            worth[expert] = -first[expert]
    # The residents are a heap, the next victim first.
    places = np.full(num_experts, -1, np.int64)
    for place in range(num_slots):
        places[residents[place]] = place
    _heapify(residents, places, worth)
    missing = np.empty(num_experts, np.int64)
    number = 0
    for step in range(len(offsets) - 1):
        begin, end = offsets[step], offsets[step + 1]
        misses = 0
        for at in range(begin, end):
            expert = experts[at]
            if places[expert] < 0:
                missing[misses] = expert
                misses += 1
                if policy == BELADY:
                    worth[expert] = -later[at]
        free = num_slots - (end - begin - misses)
        placed = 0
        if misses > 0 and free > 0:
            for at in range(begin, end):
                expert = experts[at]
                if places[expert] >= 0:
                    worth[expert] = _NEEDED
                    _down(residents, places, worth, places[expert])
            if policy == BELADY or misses > free:
                _sort_by_worth(missing, misses, worth)
            while placed < min(misses, free):
                leaving, entering = residents[0], missing[placed]
                if policy == BELADY and worth[entering] <= worth[leaving]:
                    break
                places[leaving], places[entering] = -1, 0
                residents[0] = entering
                worth[entering] = _NEEDED
                _down(residents, places, worth, 0)
                placed += 1

        halvings = numbers[step] // half_life - number // half_life
        number = numbers[step]
        halved = policy == LFU and halvings > 0
        if halved:
            for expert in range(num_experts):
                frequency[expert] >>= min(halvings, 62)
                worth[expert] = (frequency[expert] << 32) + last[expert]
        for at in range(begin, end):
            expert = experts[at]
            if policy == BELADY:
                worth[expert] = -later[at]
            else:
                last[expert] = number
                if policy == LFU:
                    frequency[expert] += FREQUENCY_UNIT
                worth[expert] = (frequency[expert] << 32) + number
            if places[expert] >= 0 and not halved:
                _up(residents, places, worth, places[expert])
                _down(residents, places, worth, places[expert])
        if halved:
            _heapify(residents, places, worth)

        counted = counts[kinds[step]]
        counted[0] += 1
        counted[1] += end - begin
        counted[2] += end - begin - misses
        counted[3] += misses - placed
        counted[4] += misses > placed
        counted[5] += end - begin > num_slots


@compiled
def reuse_distances(experts, offsets, counts):
    """Counts, for each need of an expert that was needed before, the distinct experts
    that the steps between the two needed.

    Each need looks at every expert once. With a few hundred experts this is a short
    vectorised loop, and faster than a tree over steps.

    Args:
        experts: [needed] int16.
        offsets: [n + 1] int64.
        counts: [E] int64, added to: the needs of each distance.
    """
    last = np.full(len(counts), -1, np.int32)
    for step in range(len(offsets) - 1):
        for at in range(offsets[step], offsets[step + 1]):
            before = last[experts[at]]
            if before >= 0:
                distance = 0
                if before < step - 1:
                    for expert in range(len(last)):
                        distance += last[expert] > before
                counts[distance] += 1
        for at in range(offsets[step], offsets[step + 1]):
            last[experts[at]] = step
