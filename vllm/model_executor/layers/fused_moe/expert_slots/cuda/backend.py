# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Expert slots on CUDA."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)

from vllm.model_executor.layers.fused_moe.expert_slots.backend import (
    Backend,
    is_replica,
)
from vllm.model_executor.layers.fused_moe.expert_slots.capacity.host_memory import (
    pinning_objection,
)
from vllm.model_executor.layers.fused_moe.expert_slots.config import (
    MoEPrefetchConfig,
    MoEPrefetchError,
)
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.driver import cuda_driver
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.kernels import (
    SERVED,
    choosing_among_served,
)
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.manager import (
    CudaSlotManager,
)
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.memory import DeviceMemory
from vllm.model_executor.layers.fused_moe.expert_slots.refusals import reasons
from vllm.model_executor.layers.fused_moe.expert_slots.versions import (
    keep_routing_apart,
)
from vllm.model_executor.layers.fused_moe.expert_slots.weights.bundle import (
    parameters_of_experts,
)
from vllm.model_executor.layers.fused_moe.expert_slots.weights.memory import Memory
from vllm.model_executor.layers.fused_moe.expert_slots.weights.rows import ExpertRows


class CudaBackend(Backend):
    pins = True

    def choosing_kernels(self, moe_config: Any) -> AbstractContextManager[None]:
        keep_routing_apart(moe_config)
        return choosing_among_served(moe_config)

    def objection(self, layer: Any) -> str | None:
        method = layer.quant_method
        name = getattr(getattr(method, "experts_cls", None), "__name__", None)
        if name in SERVED:
            return None
        if name is not None:
            served = ", ".join(sorted(SERVED))
            return f"its kernel is {name}, and slots on a GPU need one of {served}"
        quantised = layer.quant_config.get_name() if layer.quant_config else "its own"
        return (
            f"its experts are quantised ({quantised}), and {type(method).__name__} has "
            f"no kernel that slots can serve. {reasons.OTHER_CHECKPOINT}"
        )

    def slotted(self, experts_cls: type) -> type | None:
        return SERVED.get(experts_cls.__name__)

    def processes_on_device(self, layer: Any) -> bool:
        # Stock leaves unquantised experts as they are, and for its Triton kernel those
        # with a scale for each block or channel. To the others it does on a GPU what it
        # does.
        method: Any = layer.quant_method
        unchanged = isinstance(method, UnquantizedFusedMoEMethod) or (
            method.experts_cls.__name__ == "TritonExperts"
            and all(
                parameter.dim() > 2
                for name, parameter in parameters_of_experts(layer).items()
                if "_scale" in name
            )
        )
        return not unchanged

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
        return CudaSlotManager(
            config,
            rows,
            layer.layer_name,
            rank,
            is_replica(layer),
            layer.expert_map,
        )
