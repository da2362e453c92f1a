# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Expert slots on CUDA."""

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)

from vllm.model_executor.layers.fused_moe.expert_slots.backend import Backend
from vllm.model_executor.layers.fused_moe.expert_slots.capacity.host_memory import (
    pinning_objection,
)
from vllm.model_executor.layers.fused_moe.expert_slots.config import (
    MoEPrefetchConfig,
    MoEPrefetchError,
)
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.driver import cuda_driver
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.experts import (
    SlottedTritonExperts,
)
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.manager import (
    CudaSlotManager,
)
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.memory import DeviceMemory
from vllm.model_executor.layers.fused_moe.expert_slots.versions import (
    keep_routing_apart,
)
from vllm.model_executor.layers.fused_moe.expert_slots.weights.memory import Memory
from vllm.model_executor.layers.fused_moe.expert_slots.weights.rows import ExpertRows


class CudaBackend(Backend):
    pins = True

    def prepare(self, moe_config: Any, quant_config: Any) -> None:
        if quant_config is not None:
            return
        keep_routing_apart(moe_config)
        if moe_config.moe_backend == "auto":
            moe_config.moe_backend = "triton"

    def objection(self, layer: Any) -> str | None:
        method = layer.quant_method
        if not isinstance(method, UnquantizedFusedMoEMethod):
            name = (
                layer.quant_config.get_name()
                if layer.quant_config
                else type(method).__name__
            )
            return (
                f"its experts are quantised ({name}), and slots on a GPU serve "
                "unquantised experts only"
            )
        name = getattr(getattr(method, "experts_cls", None), "__name__", "none")
        if name == "TritonExperts":
            return None
        return f"its kernel is {name}, and slots on a GPU need --moe-backend triton"

    def slotted(self, experts_cls: type) -> type:
        return SlottedTritonExperts

    def memory(self, device: torch.device) -> Memory:
        if reason := pinning_objection():
            raise MoEPrefetchError(f"--moe-gpu-prefetch: {reason}")
        return DeviceMemory(
            cuda_driver(),
            torch.accelerator.current_device_index()
            if device.index is None
            else device.index,
            capturing=torch.cuda.is_current_stream_capturing,
            reclaim=torch.cuda.empty_cache,
        )

    def manager(
        self, config: MoEPrefetchConfig, rows: ExpertRows, layer: Any, rank: int
    ) -> CudaSlotManager:
        return CudaSlotManager(config, rows, layer.layer_name, rank, layer.expert_map)
