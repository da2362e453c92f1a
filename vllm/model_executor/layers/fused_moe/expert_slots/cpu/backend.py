# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Expert slots on vLLM's CPU platform."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from vllm.model_executor.layers.fused_moe.expert_slots.backend import (
    Backend,
    is_replica,
)
from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchConfig
from vllm.model_executor.layers.fused_moe.expert_slots.cpu.experts import (
    CPU_EXPERTS_CLASSES,
    SlottedCPUExperts,
)
from vllm.model_executor.layers.fused_moe.expert_slots.cpu.manager import CPUSlotManager
from vllm.model_executor.layers.fused_moe.expert_slots.cpu.memory import CPUMemory
from vllm.model_executor.layers.fused_moe.expert_slots.refusals import reasons
from vllm.model_executor.layers.fused_moe.expert_slots.weights.memory import Memory
from vllm.model_executor.layers.fused_moe.expert_slots.weights.rows import ExpertRows


class CPUBackend(Backend):
    pins = False

    def choosing_kernels(self, moe_config: Any) -> AbstractContextManager[None]:
        return nullcontext()  # stock's own choice

    def objection(self, layer: Any) -> str | None:
        if layer.use_ep:
            return f"{reasons.NO_EXPERT_MAP}: drop --enable-expert-parallel"
        method = layer.quant_method
        experts_cls = getattr(method, "experts_cls", None)
        name = getattr(experts_cls, "__name__", type(method).__name__)
        if name in CPU_EXPERTS_CLASSES:
            return None
        return f"its kernel {name} is not known to run on remapped expert ids"

    def slotted(self, experts_cls: type) -> type | None:
        known = experts_cls.__name__ in CPU_EXPERTS_CLASSES
        return SlottedCPUExperts if known else None

    def processes_on_device(self, layer: Any) -> bool:
        return False

    def memory(self, device: torch.device) -> Memory:
        return CPUMemory()

    def manager(
        self, config: MoEPrefetchConfig, rows: ExpertRows, layer: Any, rank: int
    ) -> CPUSlotManager:
        return CPUSlotManager(config, rows, layer.layer_name, rank, is_replica(layer))
