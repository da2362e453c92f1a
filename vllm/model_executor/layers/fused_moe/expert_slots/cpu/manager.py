# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""One layer's slots on the CPU platform: tables, decisions, loads, counters."""

import numpy as np
import torch

from vllm.model_executor.layers.fused_moe.expert_slots.backend import SlotManager
from vllm.model_executor.layers.fused_moe.expert_slots.decisions.policy import Ranking
from vllm.model_executor.layers.fused_moe.expert_slots.decisions.step import (
    StepPlan,
    checked_residency,
    needed_experts,
    plan_step,
)


class CPUSlotManager(SlotManager):
    """Decides with `plan_step` and copies with torch.

    Attributes:
        tables: which expert is where.
        history: recency and frequency, by which the policy decides.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.reset()

    def reset(self, start: Ranking | None = None) -> None:
        self.tables, self.history = self._first(start)
        self.counters.clear()
        if self.ring is not None:
            self.ring.clear()
        self.rows.fill_slots(self.tables.slot_to_expert.tolist())

    def plan(self, topk_ids: torch.Tensor) -> StepPlan:
        """Decides one step and loads nothing. Takes `topk_ids` as `step` does."""
        ids = topk_ids.numpy()
        plan = plan_step(self.tables, self.history, ids)
        if plan.needed:
            self._trace(ids)
        self.counters.add(plan)
        return plan

    def _trace(self, ids: np.ndarray) -> None:
        """Records the step that was decided last, before it is counted: a reader goes
        by the count."""
        if self.ring is not None:
            needed = needed_experts(ids, self.num_experts)
            self.ring.write(self.history.step, int(np.count_nonzero(ids >= 0)), needed)

    def remap(self, topk_ids: torch.Tensor) -> torch.Tensor:
        """Expert ids -> row numbers, same shape and dtype; -1 stays -1."""
        return torch.from_numpy(self._rows_of(topk_ids.numpy()))

    def _rows_of(self, ids: np.ndarray) -> np.ndarray:
        rows: np.ndarray = self.tables.expert_to_row.take(ids)
        return rows.astype(ids.dtype, copy=False)

    def step(
        self, topk_ids: torch.Tensor, is_padding: torch.Tensor | None = None
    ) -> torch.Tensor:
        ids = topk_ids.numpy()
        rows = self._rows_of(ids)
        if is_padding is None and rows.size and rows.min() >= self.tables.num_staged:
            self._count_hits(ids)  # every id is a resident, so the table stays
            return torch.from_numpy(rows)
        asked = topk_ids
        if is_padding is not None:
            asked = topk_ids.masked_fill(is_padding[:, None], -1)
        plan = self.plan(asked)
        if plan.misses:
            self.rows.load(plan.load_experts.tolist(), plan.load_rows.tolist())
        return self.remap(topk_ids)

    def _count_hits(self, ids: np.ndarray) -> None:
        """Completes a step without a miss or padding. Most decode steps are such, and
        take a quarter less time than by `plan`."""
        needed = needed_experts(ids, self.num_experts)
        self.history.touch(needed)
        self._trace(ids)
        self.counters.add_hits(int(np.count_nonzero(needed)))

    def residency(self) -> list[int]:
        tables = self.tables
        return checked_residency(
            tables.slot_to_expert, tables.expert_to_slot, tables.expert_to_row[:-1]
        )

    def ranking(self) -> Ranking:
        return Ranking.of(self.residency(), self.history)
