# SPDX-License-Identifier: Apache-2.0
"""What a layer's slots did, as running totals."""

from dataclasses import dataclass

from vllm.model_executor.layers.fused_moe.expert_slots.reference import StepPlan


@dataclass
class SlotCounters:
    """Totals of one layer and rank since loading. `hits + misses == needed`; every miss is one
    load; bytes are those of the loads."""

    steps: int = 0
    needed: int = 0
    hits: int = 0
    misses: int = 0
    loads: int = 0
    evictions: int = 0
    waves: int = 0
    overflow_steps: int = 0
    bytes_loaded: int = 0

    def add(self, plan: StepPlan, bytes_per_expert: int) -> None:
        loads = sum(wave.loads for wave in plan.waves)
        self.steps += 1
        self.needed += plan.needed
        self.hits += plan.hits
        self.misses += plan.needed - plan.hits
        self.loads += loads
        self.evictions += sum(wave.evicted for wave in plan.waves)
        self.waves += len(plan.waves)
        self.overflow_steps += plan.overflow
        self.bytes_loaded += loads * bytes_per_expert
