# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The memory plan of an engine that is about to start: settles N, refuses what does not
fit, and says what was decided, before a weight is read."""

import math
import mmap
import os
from dataclasses import replace
from pathlib import Path

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm.model_executor.layers.fused_moe.expert_slots.capacity.footprint import (
    CannotMeasure,
    GpuMemory,
    measure,
    rows_per_sequence,
)
from vllm.model_executor.layers.fused_moe.expert_slots.capacity.host_memory import (
    available_after_waiting,
    host_memory,
    pinning_objection,
)
from vllm.model_executor.layers.fused_moe.expert_slots.capacity.planner import (
    COMMUNICATION_BYTES,
    CONTEXT_BYTES,
    Limits,
    MemoryPlanner,
    distinct_experts,
)
from vllm.model_executor.layers.fused_moe.expert_slots.config import (
    SLOTS_KEY,
    MoEPrefetchConfig,
    MoEPrefetchError,
)
from vllm.model_executor.layers.fused_moe.expert_slots.refusals.arguments import (
    bypassed,
)
from vllm.model_executor.layers.fused_moe.expert_slots.shared_store.identity import (
    checkpoint_directory,
    store_identity,
)
from vllm.model_executor.layers.fused_moe.expert_slots.shared_store.store import (
    make_place,
    present,
)
from vllm.model_executor.layers.fused_moe.expert_slots.sizes import gib
from vllm.plugins.moe_gpu_prefetch.command import gpu_elsewhere

logger = init_logger(__name__)

_GPU_PAGE = 2 << 20
"""The granularity of CUDA's virtual memory on all published devices."""

BATCHES = (1, 4, 16, 64)


def planner_for(
    vllm_config: VllmConfig, config: MoEPrefetchConfig
) -> MemoryPlanner | None:
    """What can be asked about this model on this machine, or on the GPU elsewhere that
    this process answers for; None for a model without MoE layers.

    Raises:
        CannotMeasure: the model cannot be built from its configuration.
        MoEPrefetchError: expert slots do not run on this platform, on its GPUs, or for
            this model.
    """
    if current_platform.is_cuda():
        try:
            current_platform.check_if_supports_dtype(vllm_config.model_config.dtype)
        except ValueError as error:  # as the worker does, later
            raise MoEPrefetchError(str(error)) from None
    elsewhere = gpu_elsewhere.answer_while_building if gpu_elsewhere.pretended else None
    measurement = measure(vllm_config, elsewhere)
    if measurement.elsewhere:
        raise bypassed(vllm_config.model_config.model, config.slots)
    if not any(footprint.layers for footprint in measurement.footprints):
        return None
    limits = limits_of(vllm_config, config, measurement.gpu)
    planner = MemoryPlanner(measurement.footprints, limits, measurement.objection)
    need = planner.host_need(planner.top_k)
    if limits.host is not None and need <= limits.host.total:
        planner.limits = replace(
            limits, host=available_after_waiting(need, host_memory)
        )
    return planner


def limits_of(
    vllm_config: VllmConfig, config: MoEPrefetchConfig, gpu: GpuMemory | None
) -> Limits:
    """The limits of this machine, or of one with the GPUs that this process answers
    for.

    Args:
        gpu: the memory of this machine's smallest GPU, where that is known.
    """
    cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
    scheduler = vllm_config.scheduler_config
    gpu_bytes, gpu_limit = _gpu_limit(vllm_config, gpu)
    elsewhere = gpu_elsewhere.pretended is not None
    here, host_is_device = host_memory(), current_platform.is_cpu()
    takes_host_memory = not elsewhere and not _stores_present(vllm_config, config)
    return Limits(
        gpu_bytes=gpu_bytes,
        gpu_limit=gpu_limit,
        kv_cache_bytes=cache.kv_cache_memory_bytes,
        host=here if takes_host_memory else None,
        host_reserve=here.reserve(config.host_memory_reserve),
        ranks_per_host=max(1, parallel.world_size // parallel.nnodes),
        host_is_device=host_is_device,
        page=mmap.PAGESIZE if host_is_device else _GPU_PAGE,
        max_num_seqs=scheduler.max_num_seqs,
        max_model_len=vllm_config.model_config.max_model_len,
        shortens=vllm_config.model_config.original_max_model_len == -1,
        rows_per_sequence=rows_per_sequence(vllm_config),
    )


def _gpu_limit(vllm_config: VllmConfig, gpu: GpuMemory | None) -> tuple[int, str]:
    """Bytes that vLLM may use of each GPU, and the same in words.

    As vLLM counts: a share of the GPU's total, which must be free once a process has
    its context, and its buffers for several GPUs; or with a KV cache given in bytes,
    all that is free then.

    Raises:
        MoEPrefetchError: less is free than the share, which vLLM refuses too, later and
            in both modes.
    """
    cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
    total = current_platform.get_device_total_memory() if gpu is None else gpu.total
    share = cache.gpu_memory_utilization
    limit = int(total * share)
    in_words = f"{gib(limit)} (--gpu-memory-utilization {share:g} of {gib(total)})"
    if current_platform.is_cpu():
        return (
            (limit, in_words)
            if cache.kv_cache_memory_bytes is None
            else (total, gib(total))
        )
    free, origin = (
        total - CONTEXT_BYTES,
        " (an estimate: the total less what CUDA takes)",
    )
    if gpu is not None and gpu.free is not None:
        free, origin = gpu.free, ""
    free -= COMMUNICATION_BYTES if parallel.world_size > 1 else 0
    if free < limit:
        raise MoEPrefetchError(
            f"--gpu-memory-utilization {share:g} asks for {gib(limit)} of "
            f"{gib(total)} on the GPU, and {gib(free)} are free{origin}. Stop what "
            "else uses the GPU, or lower it to "
            f"{math.floor(100 * free / total) / 100:g}."
        )
    if cache.kv_cache_memory_bytes is None:
        return limit, in_words
    return free, f"{gib(free)} that are free of {gib(total)}{origin}"


def _stores_present(vllm_config: VllmConfig, config: MoEPrefetchConfig) -> bool:
    """Whether the shared stores of all ranks lie in memory already, so that none is to
    be had."""
    directory = checkpoint_directory(vllm_config, vllm_config.model_config)
    if config.shared_store is None or directory is None:
        return False
    return all(
        present(
            Path(config.shared_store),
            store_identity(vllm_config, vllm_config.model_config, directory, rank),
        )
        for rank in range(vllm_config.parallel_config.world_size)
    )


def _refuse_a_full_place(
    config: MoEPrefetchConfig, planner: MemoryPlanner, slots: int
) -> None:
    """Raises:
    MoEPrefetchError: the directory of the shared store has no room for it.
    """
    needed = planner.plan(slots).host_bytes
    if config.shared_store is None or planner.limits.host is None or not needed:
        return
    make_place(Path(config.shared_store))
    status = os.statvfs(config.shared_store)
    free = status.f_bavail * status.f_frsize
    if needed > free:
        raise MoEPrefetchError(
            f"--moe-gpu-prefetch-config.shared_store {config.shared_store} has room "
            f"for {gib(free)}, the experts take {gib(needed)}. Give it more (mount -o "
            "remount,size=..., or --shm-size in a container), remove old stores with "
            f"vllm-moe-prefetch stores {config.shared_store} --remove, or serve "
            "without it."
        )


def settle(vllm_config: VllmConfig) -> None:
    """Turns `auto` into a number in `vllm_config`, refuses a plan that does not fit,
    logs it.

    Raises:
        MoEPrefetchError: it does not fit; says what is needed, what there is, and the
            way out.
    """
    config = MoEPrefetchConfig.from_additional_config(vllm_config.additional_config)
    if config is None:
        return
    try:
        planner = planner_for(vllm_config, config)
    except CannotMeasure as error:
        if not isinstance(config.slots, int):
            raise MoEPrefetchError(
                f"--moe-gpu-prefetch {config.slots}: {error}. Give a number."
            ) from None
        logger.warning(
            "No memory plan, so nothing is checked before loading: %s", error
        )
        return
    if planner is None:
        return
    slots = planner.meant(config.slots)
    planner.refuse(slots, config.slots)
    reason = pinning_objection() if current_platform.is_cuda() else None
    if reason and slots < planner.num_experts:
        raise MoEPrefetchError(f"--moe-gpu-prefetch {config.slots}: {reason}")
    if config.warm_start is not None:
        make_place(Path(config.warm_start), "warm_start")
    _refuse_a_full_place(config, planner, slots)
    vllm_config.additional_config = {**vllm_config.additional_config, SLOTS_KEY: slots}
    _log(planner, slots, config)


def _log(planner: MemoryPlanner, slots: int, config: MoEPrefetchConfig) -> None:
    plan, limits = planner.plan(slots), planner.limits
    chosen = ""
    if config.slots == "auto":
        chosen = " (auto: the largest that leaves the KV cache its room)"
    elif isinstance(config.slots, str):
        chosen = f" ({config.slots}: the largest that fits in so much)"
    logger.info(
        "Memory plan: %d of %d expert slots per MoE layer%s; per rank %s of slots, "
        "%s of staging, %s of other weights, about %s of intermediates, graphs and "
        "libraries, %s of KV cache (%s), of %s; %s of experts in host memory. %s.",
        plan.slots,
        planner.num_experts,
        chosen,
        gib(plan.slot_bytes),
        gib(plan.staging_bytes),
        gib(plan.other_weight_bytes),
        gib(plan.overhead_bytes),
        gib(plan.kv_cache_bytes),
        plan.reason,
        limits.gpu_limit,
        gib(plan.host_bytes),
        expectation(planner),
    )
    expected = distinct_experts(
        planner.num_experts, planner.routed, limits.max_num_seqs
    )
    if plan.slots < planner.num_experts and expected > plan.slots:
        logger.warning(
            "With --max-num-seqs %d a full batch needs about %.0f distinct experts "
            "of a layer, more than its %d slots: steps that load the rest through "
            "staging are the normal case then. Lower --max-num-seqs to %d, or raise "
            "--moe-gpu-prefetch to %d.",
            limits.max_num_seqs,
            expected,
            plan.slots,
            plan.resident_sequences,
            min(planner.num_experts, math.ceil(expected)),
        )


def expectation(planner: MemoryPlanner) -> str:
    """Distinct experts that a decode step is expected to need, for some batch sizes."""
    counts = [
        f"{distinct_experts(planner.num_experts, planner.routed, batch):.0f} at {batch}"
        for batch in BATCHES
    ]
    return f"Distinct experts expected in a step: {', '.join(counts)} sequences"
