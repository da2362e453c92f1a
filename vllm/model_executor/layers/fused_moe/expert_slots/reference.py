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

from dataclasses import dataclass

import torch

from vllm.model_executor.layers.fused_moe.expert_slots.policy import ExpertHistory

_NEEDED_NOW = 1 << 61
"""Added to a slot's value while its expert is needed: above every value a policy can give."""


@dataclass(frozen=True)
class Wave:
    """One pass of the fused-MoE kernel over experts that are resident at the same time.

    Attributes:
        experts: [n] int64, the experts this pass computes.
        slots: [n] int64, the slot of each.
        loads: how many of them, at the end of the two lists, are loaded for this wave.
        evicted: how many loads overwrite another expert.
    """

    experts: torch.Tensor
    slots: torch.Tensor
    loads: int
    evicted: int

    @property
    def load_experts(self) -> torch.Tensor:
        return self.experts[len(self.experts) - self.loads :]

    @property
    def load_slots(self) -> torch.Tensor:
        return self.slots[len(self.slots) - self.loads :]


@dataclass(frozen=True)
class StepPlan:
    """What one step of one layer does: `waves` in order, for `needed` experts of which `hits` were
    resident when it began."""

    needed: int
    hits: int
    waves: list[Wave]

    @property
    def overflow(self) -> bool:
        return len(self.waves) > 1


class ResidencyTables:
    """Which expert is where. The two tables are each other's inverse at all times.

    Attributes:
        slot_to_expert: [N] int64, -1 = empty.
        expert_to_slot: [E + 1] int64, -1 = not resident; the last entry is a guard that keeps
            the id -1 (a padding row) at -1.
    """

    def __init__(self, num_experts: int, num_slots: int):
        self.num_experts = num_experts
        self.num_slots = num_slots
        self.slot_to_expert = torch.full((num_slots,), -1, dtype=torch.int64)
        self.expert_to_slot = torch.full((num_experts + 1,), -1, dtype=torch.int64)

    def assign(self, experts: torch.Tensor, slots: torch.Tensor) -> int:
        """Puts `experts` into `slots` (both [n] int64); returns how many were evicted for it."""
        previous = self.slot_to_expert[slots]
        self.expert_to_slot[previous] = -1
        self.slot_to_expert[slots] = experts
        self.expert_to_slot[experts] = slots
        return int((previous >= 0).sum())


def stream_width(num_slots: int) -> int:
    """Experts a streaming wave loads: half of a ring that takes a quarter of the slots."""
    return max(1, num_slots // 8)


def needed_experts(topk_ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """The distinct experts of `topk_ids` ([tokens, top_k], -1 = none), ascending, [n] int64."""
    mask = torch.zeros(num_experts + 1, dtype=torch.bool)
    mask[topk_ids.reshape(-1).to(torch.int64)] = True
    return mask[:-1].nonzero().squeeze(1)


def plan_step(tables: ResidencyTables, history: ExpertHistory, topk_ids: torch.Tensor) -> StepPlan:
    """Decides one step and brings `tables` and `history` to its end.

    Args:
        tables: the layer's tables.
        history: the layer's recency and frequency.
        topk_ids: [tokens, top_k] integers, expert ids 0 ... E-1; -1 rows need nothing.
    """
    needed = needed_experts(topk_ids, tables.num_experts)
    slots_of_needed = tables.expert_to_slot[needed]
    resident = slots_of_needed >= 0
    misses = needed[~resident]
    if len(misses) == 0:
        history.touch(needed)
        return StepPlan(len(needed), len(needed), [Wave(needed, slots_of_needed, 0, 0)])

    # Values as they were before this step: among the hits of an overflow step, all equally
    # recent by then, they still tell which one to give up first.
    hits, hit_slots = needed[resident], slots_of_needed[resident]
    values = history.values(tables.slot_to_expert)
    values[hit_slots] += _NEEDED_NOW
    order = values.argsort(stable=True)
    history.touch(needed)

    first = min(len(misses), tables.num_slots - len(hits))
    evicted = tables.assign(misses[:first], order[:first])
    waves = [
        Wave(
            torch.cat((hits, misses[:first])), torch.cat((hit_slots, order[:first])), first, evicted
        )
    ]
    streamed = misses[first:]
    if len(streamed):
        # By now every slot is full, so each streamed expert evicts one; the last to come stay.
        width = stream_width(tables.num_slots)
        ring = order[: 2 * width]
        slots = ring.repeat(-(-len(streamed) // len(ring)))[: len(streamed)]
        tables.assign(streamed[-len(ring) :], slots[-len(ring) :])
        for experts, halves in zip(streamed.split(width), slots.split(width), strict=True):
            waves.append(Wave(experts, halves, len(experts), len(experts)))
    return StepPlan(len(needed), len(hits), waves)
