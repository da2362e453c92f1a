# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What one step of one layer does. The CPU platform runs this code, and the CUDA kernel
is tested against it.

Every per-expert tensor of a layer keeps stock's shape `[E, ...]`. Its last N rows are
the layer's slots. Its first `S = E - N` rows are staging, memory that all layers share:

    row      0 ............. S-1 | S ............. E-1
             staging             | slot 0 ... slot N-1

A step needs a set of experts. Hits are in slots. A miss takes the slot of the least
valuable expert that the step does not need. When no such slot is left, the miss is
loaded into a staging row, used, and forgotten. Exactly N experts are resident and
exactly S are not, so every expert has a row: a resident its slot, any other the staging
row of its rank among the non-residents. So the table expert -> row is always a
permutation, and every step is one launch of stock's kernel.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm.model_executor.layers.fused_moe.expert_slots.decisions.policy import (
    ExpertHistory,
    Ranking,
)

_NONE: np.ndarray = np.empty(0, np.int64)


@dataclass(frozen=True)
class StepPlan:
    """What one step of one layer does.

    Attributes:
        needed: distinct experts that the step needs.
        hits: how many of them were resident when it began.
        staged: how many of the others are loaded into staging rows. They come last
            among the loads.
        load_experts: [misses] int64, the experts to load.
        load_rows: [misses] int64, the row of each.
    """

    needed: int
    hits: int
    staged: int
    load_experts: np.ndarray
    load_rows: np.ndarray

    @property
    def misses(self) -> int:
        return self.needed - self.hits


class ResidencyTables:
    """Which expert is where. No slot is ever empty.

    Attributes:
        slot_to_expert: [N] int64.
        expert_to_slot: [E] int64, -1 = not resident; the inverse of `slot_to_expert`.
        expert_to_row: [E + 1] int64, a permutation of the rows, and a last entry that
            keeps the id -1 (a row of padding) at -1.
    """

    def __init__(
        self, num_experts: int, num_slots: int, residents: Sequence[int] | None = None
    ) -> None:
        """Fills every slot.

        Args:
            num_experts: E.
            num_slots: N.
            residents: N distinct experts, which get the slots in the order of their
                ids. Not given: experts 0 ... N-1.
        """
        self.num_experts = num_experts
        self.num_slots = num_slots
        self.num_staged = num_experts - num_slots
        slots = np.arange(num_slots)
        self.slot_to_expert = slots if residents is None else np.sort(residents)
        self.expert_to_slot = np.full(num_experts, -1)
        self.expert_to_slot[self.slot_to_expert] = slots
        self.expert_to_row = np.full(num_experts + 1, -1)
        self.expert_to_row[self.slot_to_expert] = slots + self.num_staged
        self._staging_rows = np.arange(self.num_staged)
        self.expert_to_row[(self.expert_to_slot < 0).nonzero()[0]] = self._staging_rows

    def replace(self, leaving: np.ndarray, entering: np.ndarray) -> None:
        """Gives the slot of each resident in `leaving` to the expert at the same place
        in `entering`, both [n] int64."""
        slots = self.expert_to_slot[leaving]
        self.expert_to_slot[leaving] = -1
        self.expert_to_slot[entering] = slots
        self.slot_to_expert[slots] = entering
        self.expert_to_row[entering] = slots + self.num_staged
        self.expert_to_row[(self.expert_to_slot < 0).nonzero()[0]] = self._staging_rows


def first_tables(
    history: ExpertHistory, num_slots: int, start: Ranking | None
) -> ResidencyTables:
    """The tables before the first step, and `history` with the order of `start`.

    Args:
        start: residents and their order, of any number of slots. Not given: experts
            0 ... N-1 without a history.
    """
    num_experts = len(history.last_needed)
    if start is None:
        return ResidencyTables(num_experts, num_slots)
    start = start.fitted(num_experts, num_slots)
    history.resume(start)
    return ResidencyTables(num_experts, num_slots, start.experts)


def checked_residency(
    slot_to_expert: np.ndarray, expert_to_slot: np.ndarray, expert_to_row: np.ndarray
) -> list[int]:
    """The expert in each slot.

    Args:
        slot_to_expert: [N] integers.
        expert_to_slot: [E] integers, -1 = not resident.
        expert_to_row: [E] integers.

    Raises:
        AssertionError: the second is not the inverse of the first, the third is no
            permutation, or the row of a resident is not its slot.
    """
    residents, slots, rows = (
        t.tolist() for t in (slot_to_expert, expert_to_slot, expert_to_row)
    )
    inverse = [-1] * len(slots)
    for slot, expert in enumerate(residents):
        inverse[expert] = slot
    assert inverse == slots and len(set(residents)) == len(residents), (
        residents,
        slots,
    )
    assert sorted(rows) == list(range(len(rows))), rows
    num_staged = len(slots) - len(residents)
    assert all(
        rows[expert] == num_staged + slot for slot, expert in enumerate(residents)
    ), rows
    return residents


def needed_experts(topk_ids: np.ndarray, num_experts: int) -> np.ndarray:
    """Which experts are in `topk_ids`, [E] bool. The ids are integers of any shape; -1
    is none."""
    needed: np.ndarray = np.zeros(num_experts + 1, np.bool_)
    needed[topk_ids.ravel()] = True
    return needed[:-1]


def plan_step(
    tables: ResidencyTables, history: ExpertHistory, topk_ids: np.ndarray
) -> StepPlan:
    """Decides one step, and brings `tables` and `history` to its end.

    Misses get slots by their value before the step, highest first. By id instead, a
    step that needs more experts than there are slots would undo the policy. Of equals,
    the lower id is first, among misses and among victims. The misses that get a slot
    take the victims' in the order of their ids.

    Args:
        tables: the layer's tables.
        history: the layer's recency and frequency.
        topk_ids: [tokens, top_k] integers, expert ids 0 ... E-1; -1 rows need nothing.
    """
    needed = needed_experts(topk_ids, tables.num_experts)
    num_needed = int(np.count_nonzero(needed))
    if num_needed == 0:  # padding only, which is no step
        return StepPlan(0, 0, 0, _NONE, _NONE)
    resident = tables.expert_to_slot >= 0
    misses = (needed > resident).nonzero()[0]
    hits = num_needed - len(misses)
    if not len(misses):
        history.touch(needed)
        return StepPlan(num_needed, hits, 0, _NONE, _NONE)

    values = history.values()
    free = tables.num_slots - hits
    placed, loads = misses, misses
    if len(misses) > free:
        by_value = (-values[misses]).argsort(kind="stable")
        placed = np.sort(misses[by_value[:free]])
        loads = np.concatenate((placed, np.sort(misses[by_value[free:]])))
    if len(placed):
        candidates = (resident > needed).nonzero()[0]
        victims = candidates[values[candidates].argsort(kind="stable")[: len(placed)]]
        tables.replace(victims, placed)
    history.touch(needed)
    rows = tables.expert_to_row[loads]
    return StepPlan(num_needed, hits, len(misses) - len(placed), loads, rows)
