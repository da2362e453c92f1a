# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What the log says of a model that was loaded into slots."""

from typing import Any

import torch
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.mem_utils import MemorySnapshot

from vllm.model_executor.layers.fused_moe.expert_slots.capacity.device_memory import (
    DeviceUse,
    shortfall,
)
from vllm.model_executor.layers.fused_moe.expert_slots.capacity.link import (
    link_cost,
    measured_bandwidth,
    staging_copies,
)
from vllm.model_executor.layers.fused_moe.expert_slots.capacity.planner import (
    resident_sequences,
)
from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchConfig
from vllm.model_executor.layers.fused_moe.expert_slots.layer import slotted_layers
from vllm.model_executor.layers.fused_moe.expert_slots.refusals.models import (
    routed_experts,
)
from vllm.model_executor.layers.fused_moe.expert_slots.sizes import GIB
from vllm.plugins.moe_gpu_prefetch.worker import all_slotted_layers

logger = init_logger(__name__)


def report(
    model: torch.nn.Module,
    config: MoEPrefetchConfig,
    model_config: Any,
    pipeline_stages: int,
) -> None:
    """Logs one line: what the slots of this model cost, or why it has none."""
    slotted = slotted_layers(model.modules())
    if slotted:
        first = slotted[0]
        slots = sum(layer.slot_manager.rows.slot_bytes for layer in slotted)
        logger.info(
            "Expert slots: %d MoE layers, %d experts top-%d, %d slots each (%s): "
            "%.3f GiB of slots and %.3f GiB of staging for all on %s, %.3f GiB of "
            "experts in host memory, %d bytes per expert. About %d concurrent "
            "sequences keep their experts resident. The kernel is %s.",
            len(slotted),
            first.local_num_experts,
            first.top_k,
            first.num_slots,
            config.policy,
            slots / GIB,
            first.slot_manager.rows.memory.staging / GIB,
            first.moe_config.device,
            sum(layer.slot_manager.store.num_bytes for layer in slotted) / GIB,
            first.slot_manager.store.bytes_per_expert,
            resident_sequences(first.local_num_experts, first.routed, first.num_slots),
            type(first.quant_method.moe_kernel.fused_experts).__name__.removeprefix(
                "Slotted"
            ),
        )
    elif routed_experts(model):  # all are stock's, which each layer has logged
        return
    elif model_config.runner_type == "draft":
        logger.info(
            "The draft %s has no MoE layer, so it gets no slots.", model_config.model
        )
    elif pipeline_stages > 1:
        logger.info("This pipeline stage has no MoE layer, so it gets no slots.")
    else:
        logger.info(
            "--moe-gpu-prefetch %s is ignored: %s has no MoE layer.",
            config.slots,
            model_config.model,
        )


def device_use(vllm_config: Any) -> DeviceUse | None:
    """The memory of this worker's GPU now. None on the CPU platform, and on an
    integrated GPU: it shares the host's memory, which other programs use too."""
    if not current_platform.is_cuda():
        return None
    if current_platform.is_integrated_gpu(torch.accelerator.current_device_index()):
        return None
    now = MemorySnapshot()
    # The driver's memory management holds the rows, so torch does not count them.
    memories = {
        layer.slot_manager.rows.memory for layer in all_slotted_layers(vllm_config)
    }
    held = now.torch_memory + sum(memory.committed for memory in memories)
    return DeviceUse(now.total_memory, now.free_memory, held)


def report_device_use(before: DeviceUse | None, after: DeviceUse | None) -> None:
    """Warns where other programs took the GPU's memory while a model was loaded."""
    if before and after and (warning := shortfall(before, after)):
        logger.warning("%s", warning)


def report_link(model: torch.nn.Module) -> None:
    """Measures the bandwidth to this worker's GPU and logs what misses cost at it."""
    slotted = slotted_layers(model.modules())
    if not slotted or not current_platform.is_cuda():
        return
    copies = [
        copy for layer in slotted for copy in staging_copies(layer.slot_manager.rows)
    ]
    bandwidth = measured_bandwidth(copies)
    if bandwidth is None:
        return
    for layer in slotted:
        layer.slot_manager.counters.set_link(bandwidth)
    cost = link_cost(
        bandwidth,
        (
            (
                layer.local_num_experts,
                layer.routed,
                layer.num_slots,
                layer.slot_manager.store.bytes_per_expert,
            )
            for layer in slotted
        ),
    )
    logger.info("%s", cost.sentence())
    if warning := cost.warning():
        logger.warning("%s", warning)
