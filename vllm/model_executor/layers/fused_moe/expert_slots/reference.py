# SPDX-License-Identifier: Apache-2.0
"""The slot manager's decisions in plain PyTorch: runs the CPU platform, is the oracle elsewhere.

A step needs a set of experts. Where the set fits the slots, the misses take the least valuable
slots and one wave computes everything. Where it does not (an overflow step), the first wave serves
all hits and as many misses as there are slots without a needed expert; every further miss streams
through a small ring of the least valuable slots, so that the hot set survives a long prefill:

    slots by value   | v0 v1 | v2 ...         vN-1 |
                     | ring  | kept in their slots |
    wave 1           | half 0|
    wave 2           | half 1|
    wave 3           | half 0|      one half can load while the other computes
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from vllm.model_executor.layers.fused_moe.expert_slots.policy import ExpertHistory

_NEEDED_NOW = 1 << 61
"""Added to a slot's value while its expert is needed: above every value a policy can give."""


@dataclass(frozen=True)
class StepPlan:
    """What one step of one layer does.

    Attributes:
        needed: distinct experts the step needs.
        hits: how many of them were resident when it began; the first wave computes them.
        load_experts: [misses] int64, the experts to load, in the order of the loads.
        load_slots: [misses] int64, the slot of each; a slot of the ring comes up repeatedly.
        wave_loads: loads of each wave; what a wave loads, it computes. Empty: nobody is needed.
    """

    needed: int
    hits: int
    load_experts: torch.Tensor
    load_slots: torch.Tensor
    wave_loads: list[int]

    @property
    def misses(self) -> int:
        return self.needed - self.hits

    @property
    def overflow(self) -> bool:
        return len(self.wave_loads) > 1

    def waves(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The experts that each wave loads and their slots, [loads] int64 each."""
        experts = self.load_experts.split(self.wave_loads)
        return zip(experts, self.load_slots.split(self.wave_loads), strict=True)


class ResidencyTables:
    """Which expert is where. The two tables are each other's inverse at all times, and no slot is
    ever empty: they start with experts 0 ... N-1.

    Attributes:
        slot_to_expert: [N] int64.
        expert_to_slot: [E + 1] int64, -1 = not resident; the last entry is a guard that keeps
            the id -1 (a padding row) at -1.
        slots_of_experts: [E] int64, the same without the guard.
        ring_order: [E] int64, which place of the ring the first, second, ... streamed expert takes.
    """

    def __init__(self, num_experts: int, num_slots: int):
        self.num_experts = num_experts
        self.num_slots = num_slots
        self.slot_to_expert = torch.arange(num_slots)
        self.expert_to_slot = torch.full((num_experts + 1,), -1, dtype=torch.int64)
        self.expert_to_slot[:num_slots] = self.slot_to_expert
        self.slots_of_experts = self.expert_to_slot[:-1]
        self.ring_size = min(num_slots, 2 * stream_width(num_slots))
        self.ring_order = torch.arange(num_experts) % self.ring_size

    def assign(self, experts: torch.Tensor, slots: torch.Tensor) -> None:
        """Puts `experts` into `slots` (both [n] int64) in the place of whom they hold."""
        self.expert_to_slot.index_fill_(0, self.slot_to_expert.index_select(0, slots), -1)
        self.slot_to_expert.scatter_(0, slots, experts)
        self.expert_to_slot.scatter_(0, experts, slots)


def checked_residency(slot_to_expert: torch.Tensor, expert_to_slot: torch.Tensor) -> list[int]:
    """The expert in each slot.

    Args:
        slot_to_expert: [N] integers.
        expert_to_slot: [E] integers, -1 = not resident.

    Raises:
        AssertionError: the tables are not each other's inverse.
    """
    residents, slots = slot_to_expert.tolist(), expert_to_slot.tolist()
    inverse = [-1] * len(slots)
    for slot, expert in enumerate(residents):
        inverse[expert] = slot
    assert inverse == slots and len(set(residents)) == len(residents), (residents, slots)
    return residents


def stream_width(num_slots: int) -> int:
    """Experts a streaming wave loads: half of a ring that takes a quarter of the slots."""
    return max(1, num_slots // 8)


def max_waves(num_experts: int, num_slots: int, num_ids: int) -> int:
    """The most waves a step that routes `num_ids` (tokens * top_k) can take."""
    streamed = max(0, min(num_experts, num_ids) - num_slots)
    return 1 + -(-streamed // stream_width(num_slots))


def needed_experts(topk_ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Whom `topk_ids` ([tokens, top_k], -1 = nobody) names, [E] bool."""
    needed = torch.zeros(num_experts + 1, dtype=torch.bool)
    return needed.index_fill_(0, topk_ids.flatten().long(), True)[:-1]


def plan_step(tables: ResidencyTables, history: ExpertHistory, topk_ids: torch.Tensor) -> StepPlan:
    """Decides one step and brings `tables` and `history` to its end.

    Args:
        tables: the layer's tables.
        history: the layer's recency and frequency.
        topk_ids: [tokens, top_k] integers, expert ids 0 ... E-1; -1 rows need nothing.
    """
    needed = needed_experts(topk_ids, tables.num_experts)
    num_needed = int(needed.count_nonzero())
    if num_needed == 0:  # padding rows alone: not a step
        nobody = torch.empty(0, dtype=torch.int64)
        return StepPlan(0, 0, nobody, nobody, [])
    missing = tables.slots_of_experts.lt(0).logical_and_(needed)
    misses = missing.nonzero().squeeze(1)
    num_hits = num_needed - len(misses)
    if num_hits == num_needed:
        history.touch(needed)
        return StepPlan(num_needed, num_hits, misses, misses, [0])

    # Values as they were before this step: among the hits of an overflow step, all equally
    # recent by then, they still tell which one to give up first.
    values = history.values(tables.slot_to_expert)
    values.add_(needed.index_select(0, tables.slot_to_expert), alpha=_NEEDED_NOW)
    victims = values.argsort(stable=True)
    history.touch(needed)

    first = min(len(misses), tables.num_slots - num_hits)
    slots = victims[:first]
    if first == len(misses):
        tables.assign(misses, slots)
        return StepPlan(num_needed, num_hits, misses, slots, [first])

    streamed = len(misses) - first
    tables.assign(misses[:first], slots)
    ring = victims.index_select(0, tables.ring_order[:streamed])
    # The last round of the ring stays; the rounds before it are overwritten within the step.
    last = min(streamed, tables.ring_size)
    tables.assign(misses[-last:], ring[-last:])
    slots = torch.cat((slots, ring))
    full, rest = divmod(streamed, width := stream_width(tables.num_slots))
    wave_loads = [first, *[width] * full, *[rest] * (rest > 0)]
    return StepPlan(num_needed, num_hits, misses, slots, wave_loads)
