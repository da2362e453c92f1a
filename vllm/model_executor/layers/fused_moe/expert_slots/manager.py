# SPDX-License-Identifier: Apache-2.0
"""One layer's slots: tables, decisions, loads, counters."""

import torch

from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchConfig
from vllm.model_executor.layers.fused_moe.expert_slots.counters import SlotCounters
from vllm.model_executor.layers.fused_moe.expert_slots.policy import ExpertHistory
from vllm.model_executor.layers.fused_moe.expert_slots.reference import (
    ResidencyTables,
    StepPlan,
    Wave,
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
        everyone = torch.arange(self.num_slots)
        self.tables.assign(everyone, everyone)
        buffers.load(everyone, everyone)

    def plan(self, topk_ids: torch.Tensor) -> StepPlan:
        """Decides one step: which experts are needed, which slots the missing ones take, in how
        many waves. The tables stand at the end of the step when it returns.

        Args:
            topk_ids: [tokens, top_k] integers, 0 ... E-1, or -1 for a row that needs nothing.
        """
        plan = plan_step(self.tables, self.history, topk_ids)
        self.counters.add(plan)
        return plan

    def load(self, wave: Wave) -> None:
        """Makes every expert of `wave` resident. Waves are loaded in the order of the plan."""
        if wave.loads:
            self.buffers.load(wave.load_experts, wave.load_slots)

    def remap(self, topk_ids: torch.Tensor) -> torch.Tensor:
        """Expert ids -> slot numbers, same shape and dtype; -1 stays -1."""
        return self.tables.expert_to_slot.to(topk_ids.dtype)[topk_ids.to(torch.int64)]
