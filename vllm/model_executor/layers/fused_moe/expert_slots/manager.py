# SPDX-License-Identifier: Apache-2.0
"""One layer's slots: tables, decisions, loads, counters."""

import torch

from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchConfig
from vllm.model_executor.layers.fused_moe.expert_slots.counters import SlotCounters
from vllm.model_executor.layers.fused_moe.expert_slots.policy import ExpertHistory
from vllm.model_executor.layers.fused_moe.expert_slots.reference import (
    ResidencyTables,
    StepPlan,
    checked_residency,
    plan_step,
)
from vllm.model_executor.layers.fused_moe.expert_slots.slots import SlotBuffers


class ExpertSlotManager:
    """Keeps the experts a step needs in slots. One per MoE layer and rank.

    Starts warm: every slot filled, with experts 0 ... N-1, so that the first request does not pay
    for an empty cache.
    """

    def __init__(
        self, config: MoEPrefetchConfig, buffers: SlotBuffers, layer_name: str = "", rank: int = 0
    ):
        self.buffers = buffers
        self.store = buffers.store
        self.num_experts = self.store.num_experts
        self.num_slots = buffers.num_slots
        self.tables = ResidencyTables(self.num_experts, self.num_slots)
        self.history = ExpertHistory(self.num_experts, config.policy, config.lfu_half_life)
        self.counters = SlotCounters(
            layer_name, rank, self.num_slots, self.store.bytes_per_expert, self.num_experts
        )
        buffers.load(self.tables.slot_to_expert, self.tables.slot_to_expert)

    def plan(self, topk_ids: torch.Tensor) -> StepPlan:
        """Decides one step: which experts are needed, which slots the missing ones take, in how
        many waves. The tables stand at the end of the step when it returns.

        Args:
            topk_ids: [tokens, top_k] integers, 0 ... E-1, or -1 for a row that needs nothing.
        """
        plan = plan_step(self.tables, self.history, topk_ids)
        self.counters.add(plan)
        return plan

    def remap(self, topk_ids: torch.Tensor) -> torch.Tensor:
        """Expert ids -> slot numbers, same shape and dtype; -1 stays -1."""
        slots = self.tables.expert_to_slot.take(topk_ids.long())
        return slots.to(topk_ids.dtype)

    def residency(self) -> list[int]:
        """The expert in each slot, [N], after a check that the tables are each other's inverse."""
        return checked_residency(self.tables.slot_to_expert, self.tables.slots_of_experts)
