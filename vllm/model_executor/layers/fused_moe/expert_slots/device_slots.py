# SPDX-License-Identifier: Apache-2.0
"""One layer's slots on a GPU: the decisions of `reference.py` and the loads, both as kernels, so
that a step never waits for the host and can be captured in a CUDA graph."""

from dataclasses import dataclass

import torch
from vllm.triton_utils import triton

from vllm.model_executor.layers.fused_moe.expert_slots.config import (
    MoEPrefetchConfig,
    MoEPrefetchError,
)
from vllm.model_executor.layers.fused_moe.expert_slots.counters import TOTALS, SlotCounters
from vllm.model_executor.layers.fused_moe.expert_slots.gather_kernel import (
    UNIT_BYTES,
    gather_kernel,
)
from vllm.model_executor.layers.fused_moe.expert_slots.plan_kernel import IDS, plan_kernel
from vllm.model_executor.layers.fused_moe.expert_slots.policy import FREQUENCY_UNIT
from vllm.model_executor.layers.fused_moe.expert_slots.reference import (
    checked_residency,
    max_waves,
    stream_width,
)
from vllm.model_executor.layers.fused_moe.expert_slots.slots import SlotBuffers

_LANE_BYTES = 16
_GATHER_PROGRAMS = 64
"""Programs of a gather: 64 units of 32 KiB in flight cover the latency of any bus, and leave the
rest of the GPU to the wave that computes meanwhile."""


@dataclass(frozen=True)
class DeviceStep:
    """What a step does, on the device. Valid until the layer's next step.

    Attributes:
        guarded_tables: [waves, 1 + E] int32, -1, which a kernel that looks the id -1 up finds, then
            expert -> slot in each wave, -1 = not in this wave. A step may need fewer waves than
            its shape allows: the rest are empty.
        slot_ids: [tokens, top_k] int32, the expert ids as slot numbers; None if `waves` > 1.
    """

    waves: int
    guarded_tables: torch.Tensor
    slot_ids: torch.Tensor | None


class _Gather:
    """The addresses and the division of labour of a layer's loads."""

    def __init__(self, buffers: SlotBuffers, device: torch.device):
        store = buffers.store
        names = list(store.tensors)
        rows = []
        for name in names:
            home, slots = store.tensors[name], buffers.tensors[name]
            row = home[0].numel() * home.element_size()
            if not home.is_contiguous() or row % _LANE_BYTES or home.data_ptr() % _LANE_BYTES:
                raise MoEPrefetchError(
                    f"{name}: one expert's row of {tuple(home.shape[1:])} {home.dtype} is {row} "
                    f"bytes; expert slots on a GPU copy contiguous rows of a multiple of "
                    f"{_LANE_BYTES} bytes. Serve this model without --moe-gpu-prefetch."
                )
            assert slots.is_contiguous()
            rows.append(row // _LANE_BYTES)
        unit = UNIT_BYTES // _LANE_BYTES
        units = [(t, lane) for t, lanes in enumerate(rows) for lane in range(0, lanes, unit)]

        def on_device(values: list[int], dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        self.homes = on_device([store.tensors[n].data_ptr() for n in names], torch.int64)
        self.slots = on_device([buffers.tensors[n].data_ptr() for n in names], torch.int64)
        self.row_lanes = on_device(rows, torch.int64)
        self.unit_tensor = on_device([t for t, _ in units], torch.int32)
        self.unit_lane = on_device([lane for _, lane in units], torch.int64)


class DeviceSlotManager:
    """Keeps the experts a step needs in slots, deciding on the device. One per MoE layer and rank.

    Same decisions, counters and warm start as `ExpertSlotManager`.

    Attributes:
        slot_to_expert: [N] int32. expert_to_slot: [E] int32, -1 = not resident.
        last_needed, frequency: [E] int64, as in `ExpertHistory`.
        totals: [9] int64, the counters in the order of `TOTALS`.
    """

    def __init__(
        self, config: MoEPrefetchConfig, buffers: SlotBuffers, layer_name: str = "", rank: int = 0
    ):
        self.config = config
        self.buffers = buffers
        self.store = buffers.store
        self.num_experts = self.store.num_experts
        self.num_slots = buffers.num_slots
        self.counters = SlotCounters(
            layer_name, rank, self.num_slots, self.store.bytes_per_expert, self.num_experts
        )
        device = next(iter(buffers.tensors.values())).device
        self._mirror = self.counters.device_mirror(device)
        self._gather = _Gather(buffers, device)

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        experts, slots = self.num_experts, self.num_slots
        self._experts_pad = triton.next_power_of_2(experts)
        self._slots_pad = triton.next_power_of_2(slots)
        self.slot_to_expert = zeros(slots)
        self.expert_to_slot = zeros(experts)
        self.last_needed = zeros(experts, dtype=torch.int64)
        self.frequency = zeros(experts, dtype=torch.int64)
        self.totals = zeros(len(TOTALS), dtype=torch.int64)
        self.load_experts = zeros(experts)
        self.load_slots = zeros(experts)
        self.head = zeros(4)
        waves = max_waves(experts, slots, experts)
        self._guarded_tables = zeros(waves, 1 + experts) - 1
        self._flags = zeros(self._experts_pad)
        self._order = zeros(2, self._slots_pad, dtype=torch.int64)
        self.reset()

    def reset(self) -> None:
        """Back to the start: experts 0 ... N-1 in the slots, nobody needed yet, nothing counted."""
        everyone = torch.arange(self.num_slots)
        self.slot_to_expert.copy_(everyone)
        self.expert_to_slot.fill_(-1)
        self.expert_to_slot[: self.num_slots] = self.slot_to_expert
        for tensor in (self.last_needed, self.frequency, self.totals):
            tensor.zero_()
        self._mirror.copy_(self.totals)
        self.buffers.load(everyone, everyone)

    def plan(self, topk_ids: torch.Tensor, is_padding: torch.Tensor | None = None) -> DeviceStep:
        """Decides one step.

        Args:
            topk_ids: [tokens, top_k] integers on the device, 0 ... E-1, or -1 for nobody.
            is_padding: [tokens] bool on the device; rows that need nothing, whatever they route.
        """
        topk_ids = topk_ids.to(torch.int32).contiguous()
        num_ids = topk_ids.numel()
        waves = max_waves(self.num_experts, self.num_slots, num_ids)
        width = stream_width(self.num_slots)
        slot_ids = torch.empty_like(topk_ids) if waves == 1 else None
        plan_kernel[(1,)](
            topk_ids,
            topk_ids if is_padding is None else is_padding.view(torch.uint8),
            num_ids,
            self.slot_to_expert,
            self.expert_to_slot,
            self.last_needed,
            self.frequency,
            self.totals,
            self._mirror,
            self.store.bytes_per_expert,
            waves,
            self._guarded_tables[:, 1:],
            self.load_experts,
            self.load_slots,
            self.head,
            topk_ids if slot_ids is None else slot_ids,
            self._flags,
            self._order,
            E=self.num_experts,
            N=self.num_slots,
            TOP_K=topk_ids.shape[-1],
            ONE_WAVE=waves == 1,
            WIDTH=width,
            RING=min(self.num_slots, 2 * width),
            LFU=self.config.policy == "lfu",
            HALF_LIFE=self.config.lfu_half_life,
            UNIT=FREQUENCY_UNIT,
            HAS_PADDING=is_padding is not None,
            E_PAD=self._experts_pad,
            N_PAD=self._slots_pad,
            IDS=IDS,
            CHUNK=max(1, 4096 // self._slots_pad),
            num_warps=8,
        )
        return DeviceStep(waves, self._guarded_tables, slot_ids)

    def residency(self) -> list[int]:
        """As `ExpertSlotManager.residency`; waits for the device."""
        return checked_residency(self.slot_to_expert, self.expert_to_slot)

    def load(self, wave: int) -> None:
        """Starts the loads of one wave of the step that was planned last."""
        gather = self._gather
        gather_kernel[(_GATHER_PROGRAMS,)](
            self.load_experts,
            self.load_slots,
            self.head,
            gather.homes,
            gather.slots,
            gather.row_lanes,
            gather.unit_tensor,
            gather.unit_lane,
            wave,
            UNITS=len(gather.unit_tensor),
            WIDTH=stream_width(self.num_slots),
            LANES=UNIT_BYTES // _LANE_BYTES,
            num_warps=8,
        )
