# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The memory of the GPUs that the ranks will run on, and how much of it vLLM may
use."""

import math
from dataclasses import dataclass

import torch
from vllm.config import ParallelConfig, VllmConfig
from vllm.platforms import current_platform
from vllm.platforms.interface import set_assigned_physical_gpu_ids

from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError
from vllm.model_executor.layers.fused_moe.expert_slots.sizes import GIB, gib

_CONTEXT_BYTES = GIB // 2
"""CUDA's context: what a process takes of a GPU before it allocates anything. An
estimate for a GPU that is elsewhere. Of this machine's GPUs the free memory is read by
a process that has a context."""

_COMMUNICATION_BYTES = GIB
"""Buffers of NCCL and of vLLM's own all-reduce, on every GPU of several. An estimate:
vLLM's logs show about 1.4 GiB beside torch with two GPUs, the context included."""


@dataclass(frozen=True)
class GpuMemory:
    """Bytes of the smallest of this machine's GPUs, as `cudaMemGetInfo` gives them to a
    process that has a context there. `free` is None if ranks may run on other GPUs."""

    total: int
    free: int | None


def smallest_gpu(parallel: ParallelConfig) -> GpuMemory | None:
    """The smallest of the GPUs that this machine's ranks will run on; None if this
    process sees no GPU.

    Ranks that Ray or torchrun places may run on other GPUs than these, so only the
    total is taken then.

    Raises:
        MoEPrefetchError: a GPU shares its memory with the host.
    """
    if parallel.assigned_physical_gpu_ids is not None:
        set_assigned_physical_gpu_ids(parallel.assigned_physical_gpu_ids)
    placed_by_others = parallel.distributed_executor_backend in (
        "ray",
        "external_launcher",
    )
    ranks = 1 if placed_by_others else parallel.world_size // parallel.nnodes
    seen = []
    for rank in range(min(ranks, torch.accelerator.device_count())):
        device = current_platform.logical_device_id_to_visible_device_id(rank)
        if current_platform.is_integrated_gpu(device):
            raise MoEPrefetchError(
                "--moe-gpu-prefetch saves no memory on "
                f"{current_platform.get_device_name(device)}: this GPU uses the "
                "host's memory, so slots would be second copies of the experts. Serve "
                "without --moe-gpu-prefetch."
            )
        free, total = torch.accelerator.get_memory_info(device)
        seen.append(GpuMemory(total, None if placed_by_others else free))
    return min(
        seen,
        key=lambda gpu: gpu.total if gpu.free is None else gpu.free,
        default=None,
    )


def usable_memory(vllm_config: VllmConfig, gpu: GpuMemory | None) -> tuple[int, str]:
    """Bytes that vLLM may use of each GPU, and the same in words.

    vLLM takes a share of the GPU's total. That much must be free once a process has its
    context and, with several GPUs, its communication buffers. If the KV cache is given
    in bytes, vLLM takes all that is free then.

    Args:
        gpu: the memory of this machine's smallest GPU; None for a GPU elsewhere.

    Raises:
        MoEPrefetchError: less than the share is free. vLLM refuses that too, later, and
            also if the KV cache is given in bytes.
    """
    cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
    total = current_platform.get_device_total_memory() if gpu is None else gpu.total
    share = cache.gpu_memory_utilization
    limit = int(total * share)
    in_words = f"{gib(limit)} (--gpu-memory-utilization {share:g} of {gib(total)})"
    if current_platform.is_cpu():
        if cache.kv_cache_memory_bytes is None:
            return limit, in_words
        return total, gib(total)
    if gpu is not None and gpu.free is not None:
        free, origin = gpu.free, ""
    else:
        free = total - _CONTEXT_BYTES
        origin = " (an estimate: the total less what CUDA takes)"
    free -= _COMMUNICATION_BYTES if parallel.world_size > 1 else 0
    if free < limit:
        raise MoEPrefetchError(
            f"--gpu-memory-utilization {share:g} asks for {gib(limit)} of "
            f"{gib(total)} on the GPU, and {gib(free)} are free{origin}. Stop the "
            "other programs on the GPU, or lower it to "
            f"{math.floor(100 * free / total) / 100:g}."
        )
    if cache.kv_cache_memory_bytes is None:
        return limit, in_words
    return free, f"{gib(free)} that are free of {gib(total)}{origin}"
