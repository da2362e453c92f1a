# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The CPU's decisions and the kernels, fed the same and compared after every step: in
the interpreter by `tests/cuda/test_plan_and_gather.py`, on a GPU by
`benchmarks/gpu/proof.py`."""

import torch

from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchConfig
from vllm.model_executor.layers.fused_moe.expert_slots.cpu.manager import CPUSlotManager
from vllm.model_executor.layers.fused_moe.expert_slots.cpu.memory import CPUMemory
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.manager import (
    CudaSlotManager,
)
from vllm.model_executor.layers.fused_moe.expert_slots.decisions.policy import Ranking
from vllm.model_executor.layers.fused_moe.expert_slots.decisions.step import StepPlan
from vllm.model_executor.layers.fused_moe.expert_slots.weights.host_pages import (
    host_tensor,
)
from vllm.model_executor.layers.fused_moe.expert_slots.weights.memory import Memory
from vllm.model_executor.layers.fused_moe.expert_slots.weights.rows import ExpertRows
from vllm.model_executor.layers.fused_moe.expert_slots.weights.store import ExpertStore

SMALL_ROWS = {"w13_scale": 4, "w2_scale": 8, "w13_bias": 200, "w2_bias": 401}
"""Tensors with rows of so many bytes: no multiples of 16."""


def make_store(experts: int, width: int = 8, small: bool = True) -> ExpertStore:
    """Tensors of different rows; every word names its expert and place."""
    w13 = torch.arange(experts * 3 * width, dtype=torch.int64).reshape(
        experts, 3, width
    )
    tensors = {"w13_weight": w13, "w2_weight": -w13[:, 0].contiguous()}
    for name, size in SMALL_ROWS.items() if small else ():
        place = torch.arange(experts * size).reshape(experts, size)
        tensors[name] = (place * 31 + len(name)).to(torch.uint8)
    homes = {
        name: host_tensor(t.shape, t.dtype).copy_(t) for name, t in tensors.items()
    }
    return ExpertStore(homes)


def make_rows(store: ExpertStore, slots: int, memory: Memory) -> ExpertRows:
    return ExpertRows(store, slots, memory)


class Pair:
    """The reference on the CPU and the kernels in `memory`, which is a GPU's or the
    host's."""

    def __init__(
        self,
        experts: int,
        slots: int,
        policy: str,
        half_life: int = 4,
        memory: Memory | None = None,
        expert_map: torch.Tensor | None = None,
        traced: bool = True,
    ):
        self.expert_map = expert_map
        store = make_store(experts)
        config = MoEPrefetchConfig(
            slots=slots,
            policy=policy,
            lfu_half_life=half_life,
            trace="not written" if traced else None,
        )
        self.reference = CPUSlotManager(config, make_rows(store, slots, CPUMemory()))
        rows = make_rows(store, slots, memory or CPUMemory())
        self.where = rows.tensors["w13_weight"].device
        here = None if expert_map is None else expert_map.to(self.where)
        self.device = CudaSlotManager(config, rows, expert_map=here)

    def reset(self, start: Ranking | None = None) -> None:
        """Both as `SlotManager.reset` says; compared after a step that needs
        nothing."""
        self.reference.reset(start)
        self.device.reset(start)
        self.step(torch.full((1, 1), -1, dtype=torch.int32))

    def step(
        self, topk_ids: torch.Tensor, is_padding: torch.Tensor | None = None
    ) -> None:
        """One step of both; `topk_ids` are the model's ids if there is an expert
        map."""
        local = topk_ids
        if self.expert_map is not None:
            local = torch.where(topk_ids >= 0, self.expert_map[topk_ids.long()], -1)
        asked = local
        if is_padding is not None:
            asked = local.masked_fill(is_padding[:, None], -1)
        plan = self.reference.plan(asked)
        mask = None if is_padding is None else is_padding.to(self.where)
        rows = self.device.plan(topk_ids.to(self.where), mask)
        self.device.load()
        if self.expert_map is None:
            assert torch.equal(rows.cpu(), self.reference.remap(local))
        else:
            assert torch.equal(rows.cpu(), self.reference.remap(self.expert_map))
        self._check(plan, asked)

    def _check(self, plan: StepPlan, asked: torch.Tensor) -> None:
        reference, device = self.reference, self.device
        tables, history = reference.tables, reference.history
        for name in ("slot_to_expert", "expert_to_slot"):
            assert getattr(device, name).tolist() == getattr(tables, name).tolist()
        assert device.expert_to_row.tolist() == tables.expert_to_row[:-1].tolist()
        assert device.last_needed.tolist() == history.last_needed.tolist()
        assert device.frequency.tolist() == history.frequency.tolist()
        misses = device.num_loads.item()
        assert misses == plan.misses
        assert device.load_experts[:misses].tolist() == plan.load_experts.tolist()
        assert device.load_rows[:misses].tolist() == plan.load_rows.tolist()
        counted = reference.counters.as_dict()
        assert device.totals.tolist() == [
            counted[name] for name in list(counted)[: len(device.totals)]
        ]
        assert device.counters.as_dict() == counted
        if reference.ring is not None:
            assert torch.equal(device.ring.tensor, reference.ring.tensor)
        # What the step needs is in its rows, and every slot holds its expert.
        needed = torch.unique(asked[asked >= 0]).long()
        rows = torch.from_numpy(tables.expert_to_row)[needed].long()
        residents = device.residency()
        assert device.ranking() == reference.ranking()
        for name, home in device.store.tensors.items():
            assert torch.equal(device.rows.tensors[name].cpu()[rows], home[needed])
            assert torch.equal(device.rows.slot_rows[name].cpu(), home[residents])


def routing(
    generator: torch.Generator, tokens: int, experts: int, top_k: int, skew: float
):
    """[tokens, top_k] distinct experts a token; `skew` 0 is uniform, more is ever more
    the same."""
    favour = torch.arange(experts, dtype=torch.float32).neg_().mul_(skew)
    noise = -torch.log(-torch.log(torch.rand(tokens, experts, generator=generator)))
    return (favour + noise).topk(top_k).indices.to(torch.int32)
