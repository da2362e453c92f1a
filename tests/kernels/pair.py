# SPDX-License-Identifier: Apache-2.0
"""The reference and the kernels, fed the same and compared after every step: in the interpreter by
the tests beside this file, on a GPU by `benchmarks/gpu_check.py`."""

import torch

from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchConfig
from vllm.model_executor.layers.fused_moe.expert_slots.counters import TOTALS
from vllm.model_executor.layers.fused_moe.expert_slots.device_slots import DeviceSlotManager
from vllm.model_executor.layers.fused_moe.expert_slots.host_store import ExpertStore
from vllm.model_executor.layers.fused_moe.expert_slots.manager import ExpertSlotManager
from vllm.model_executor.layers.fused_moe.expert_slots.pinning import pinned
from vllm.model_executor.layers.fused_moe.expert_slots.reference import StepPlan
from vllm.model_executor.layers.fused_moe.expert_slots.slots import SlotBuffers


def make_store(experts: int, width: int = 8) -> ExpertStore:
    """Two tensors of different rows; every word names its expert and place."""
    w13 = torch.arange(experts * 3 * width, dtype=torch.int64).reshape(experts, 3, width)
    return ExpertStore({"w13_weight": w13, "w2_weight": -w13[:, 0].contiguous()})


def make_manager(
    cls, store: ExpertStore, slots: int, policy: str, half_life: int, device: str = "cpu"
):
    parameters = {
        name: torch.nn.Parameter(t, requires_grad=False) for name, t in store.tensors.items()
    }
    buffers = SlotBuffers(parameters, store, slots, torch.device(device))
    return cls(MoEPrefetchConfig(slots=slots, policy=policy, lfu_half_life=half_life), buffers)


class Pair:
    """The reference on the CPU and the kernels on `device`."""

    def __init__(
        self, experts: int, slots: int, policy: str, half_life: int = 4, device: str = "cpu"
    ):
        self.where = device
        store = make_store(experts)
        if device != "cpu":
            store = ExpertStore({name: pinned(t) for name, t in store.tensors.items()})
        self.reference = make_manager(ExpertSlotManager, store, slots, policy, half_life)
        self.device = make_manager(DeviceSlotManager, store, slots, policy, half_life, device)

    def step(self, topk_ids: torch.Tensor, is_padding: torch.Tensor | None = None) -> None:
        asked = topk_ids
        if is_padding is not None:
            asked = topk_ids.masked_fill(is_padding[:, None], -1)
        before = self.reference.tables.slots_of_experts.clone()
        plan = self.reference.plan(asked)
        mask = None if is_padding is None else is_padding.to(self.where)
        step = self.device.plan(topk_ids.to(self.where), mask)
        wave_tables = step.guarded_tables[:, 1:].cpu()
        assert step.waves >= len(plan.wave_loads)
        for wave in range(step.waves):
            if wave <= len(plan.wave_loads):  # of the empty waves, one
                self.device.load(wave)
            self._check_wave(plan, before, asked, wave, wave_tables[wave])
        self.reference.buffers.load(plan.load_experts, plan.load_slots)
        self._check_state(plan)
        if step.waves == 1:
            slot_ids = step.slot_ids.cpu()
            table = torch.cat((wave_tables[0], torch.tensor([-1], dtype=torch.int32)))
            assert torch.equal(slot_ids, table[topk_ids.long()])
            real = asked >= 0
            assert torch.equal(slot_ids[real], self.reference.remap(asked)[real])

    def _check_wave(
        self, plan: StepPlan, before: torch.Tensor, asked: torch.Tensor, wave: int, table
    ) -> None:
        """The wave's table is the reference's, and its experts are in their slots now."""
        expected = torch.full_like(table, -1)
        if wave == 0 and plan.needed:
            needed = torch.unique(asked[asked >= 0]).long()
            hits = needed[before[needed] >= 0]
            expected[hits] = before[hits].int()
        waves = list(plan.waves())
        if wave < len(waves):
            experts, slots = waves[wave]
            expected[experts] = slots.int()
        assert torch.equal(table, expected)
        present = torch.nonzero(table >= 0).flatten()
        for name, home in self.device.store.tensors.items():
            slots = self.device.buffers.tensors[name].cpu()
            assert torch.equal(slots[table[present].long()], home[present])

    def _check_state(self, plan: StepPlan) -> None:
        reference, device = self.reference, self.device
        tables, history = reference.tables, reference.history
        assert torch.equal(device.slot_to_expert.long().cpu(), tables.slot_to_expert)
        assert torch.equal(device.expert_to_slot.long().cpu(), tables.slots_of_experts)
        assert torch.equal(device.last_needed.cpu(), history.last_needed)
        assert torch.equal(device.frequency.cpu(), history.frequency)
        assert device.head[:3].tolist() == [plan.needed, plan.hits, plan.misses]
        assert torch.equal(device.load_experts[: plan.misses].cpu().long(), plan.load_experts)
        assert torch.equal(device.load_slots[: plan.misses].cpu().long(), plan.load_slots)
        for name, slots in reference.buffers.tensors.items():
            assert torch.equal(device.buffers.tensors[name].cpu(), slots)
        counted = reference.counters.as_dict()
        assert device.totals.tolist() == [counted[name] for name in TOTALS]
        assert device.counters.as_dict() == counted


def routing(generator: torch.Generator, tokens: int, experts: int, top_k: int, skew: float):
    """[tokens, top_k] distinct experts a token; `skew` 0 is uniform, more is ever more the same."""
    favour = torch.arange(experts, dtype=torch.float32).neg_().mul_(skew)
    noise = -torch.log(-torch.log(torch.rand(tokens, experts, generator=generator)))
    return (favour + noise).topk(top_k).indices.to(torch.int32)
