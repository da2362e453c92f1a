# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""One layer's slots on a GPU. One kernel makes the decisions of `decisions/step.py`,
another loads. So a step never waits for the host and can be captured in a CUDA
graph."""

from functools import cache

import torch
from vllm.triton_utils import triton

from vllm.model_executor.layers.fused_moe.expert_slots.backend import SlotManager
from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchConfig
from vllm.model_executor.layers.fused_moe.expert_slots.counters import TOTALS
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.gather_kernel import Gather
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.plan_kernel import (
    plan_constants,
    plan_kernel,
)
from vllm.model_executor.layers.fused_moe.expert_slots.decisions.policy import (
    ExpertHistory,
    Ranking,
)
from vllm.model_executor.layers.fused_moe.expert_slots.decisions.step import (
    checked_residency,
)
from vllm.model_executor.layers.fused_moe.expert_slots.weights.rows import ExpertRows


class CudaSlotManager(SlotManager):
    """The decisions, counters and start of `CPUSlotManager`, on the device.

    Attributes:
        slot_to_expert: [N] int32.
        expert_to_slot: [E] int32, -1 = not resident.
        expert_to_row: [E] int32.
        last_needed: [E] int64, as in `ExpertHistory`.
        frequency: [E] int64, as in `ExpertHistory`.
        totals: [totals] int64, the counters in the order of `TOTALS`.
        num_loads: [1] int32, the loads of the last step.
        load_experts: [E] int32, their experts.
        load_rows: [E] int32, their rows.
    """

    def __init__(
        self,
        config: MoEPrefetchConfig,
        rows: ExpertRows,
        layer_name: str = "",
        rank: int = 0,
        replica: bool = False,
        expert_map: torch.Tensor | None = None,
    ):
        """Allocates the tables on the device of `rows`, and loads the first residents.

        Args:
            config: what was asked for.
            rows: the layer's rows, in device memory.
            layer_name: names the counters.
            rank: of this worker, names the counters.
            replica: as in `SlotManager`.
            expert_map: under expert parallelism [experts of the model] int32, the
                expert's id on this rank or -1.
        """
        super().__init__(config, rows, layer_name, rank, replica)
        tensors = list(rows.tensors.values())
        device = tensors[0].device
        homes = [rows.memory.pin(home) for home in self.store.tensors.values()]
        self._gather = Gather(homes, tensors)
        self._mirror = rows.memory.pin(self.counters.tensor)
        # Without a trace the kernel writes to no ring.
        ring = self.ring
        self._ring = self._mirror if ring is None else rows.memory.pin(ring.tensor)

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        experts = self.num_experts
        self.slot_to_expert = zeros(self.num_slots)
        self.expert_to_slot = zeros(experts)
        self.expert_to_row = zeros(experts)
        self.last_needed = zeros(experts, dtype=torch.int64)
        self.frequency = zeros(experts, dtype=torch.int64)
        self.totals = zeros(len(TOTALS), dtype=torch.int64)
        self.num_loads = zeros(1)
        self.load_experts = zeros(experts)
        self.load_rows = zeros(experts)
        self._expert_map = expert_map
        # A kernel that looks up the id -1 in the map reads the entry in front of it,
        # which is -1: no row.
        self._mapped = None if expert_map is None else zeros(1 + len(expert_map)) - 1
        pad = triton.next_power_of_2(experts)
        self._scratch = zeros(pad), zeros(pad)
        self._constants = plan_constants(
            experts,
            self.num_slots,
            config.policy,
            config.lfu_half_life,
            self.ring is not None,
        )
        self.reset()

    def reset(self, start: Ranking | None = None) -> None:
        tables, history = self._first(start)
        self.slot_to_expert.copy_(torch.from_numpy(tables.slot_to_expert))
        self.expert_to_slot.copy_(torch.from_numpy(tables.expert_to_slot))
        self.expert_to_row.copy_(torch.from_numpy(tables.expert_to_row[:-1]))
        self.last_needed.copy_(torch.from_numpy(history.last_needed))
        self.frequency.copy_(torch.from_numpy(history.frequency))
        self.totals.zero_()
        self.counters.clear()
        if self.ring is not None:
            self.ring.clear()
        self.rows.fill_slots(tables.slot_to_expert.tolist())

    def step(
        self, topk_ids: torch.Tensor, is_padding: torch.Tensor | None = None
    ) -> torch.Tensor:
        rows = self.plan(topk_ids, is_padding)
        self.load()
        return rows

    def plan(
        self, topk_ids: torch.Tensor, is_padding: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Decides one step; takes and returns what `step` does."""
        topk_ids = topk_ids.contiguous()
        mapped = self._mapped
        rows = torch.empty_like(topk_ids) if mapped is None else mapped[1:]
        plan_kernel[(1,)](
            topk_ids,
            topk_ids if is_padding is None else is_padding.view(torch.uint8),
            topk_ids if self._expert_map is None else self._expert_map,
            topk_ids.numel(),
            self.num_experts if self._expert_map is None else len(self._expert_map),
            self.slot_to_expert,
            self.expert_to_slot,
            self.expert_to_row,
            self.last_needed,
            self.frequency,
            self.totals,
            self._mirror,
            self._ring,
            self.store.bytes_per_expert,
            self.num_loads,
            self.load_experts,
            self.load_rows,
            rows,
            *self._scratch,
            TOP_K=topk_ids.shape[-1],
            HAS_PADDING=is_padding is not None,
            HAS_MAP=mapped is not None,
            **self._constants,
        )
        return rows

    def load(self) -> None:
        """Launches the loads of the step that was planned last."""
        self._gather.launch(self.num_loads, self.load_experts, self.load_rows)

    def residency(self) -> list[int]:
        """As `SlotManager.residency`. Waits for the device."""
        tables = (self.slot_to_expert, self.expert_to_slot, self.expert_to_row)
        return checked_residency(*(table.cpu().numpy() for table in tables))

    def ranking(self) -> Ranking:
        """As `SlotManager.ranking`, over a stream of its own.

        The call waits for its five small copies. It does not wait for the engine's
        stream, which may hold steps or a collective operation that never ends, and that
        stream does not wait for it.
        """
        where = self.slot_to_expert
        stream = _reading_stream(where.device) if where.is_cuda else None
        with torch.cuda.device_of(where), torch.cuda.stream(stream):
            history = ExpertHistory(
                self.num_experts, self.config.policy, self.config.lfu_half_life
            )
            history.last_needed = self.last_needed.cpu().numpy()
            history.frequency = self.frequency.cpu().numpy()
            return Ranking.of(self.residency(), history)


@cache
def _reading_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all layers of a device. Torch hands out the 32 streams of a pool
    in turn, so one for each layer would include the engine's own."""
    return torch.cuda.Stream(device)
