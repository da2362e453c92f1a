# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The capacity plan of an engine that is about to start. It settles N, refuses what
does not fit, and logs the decision, before a weight is read."""

import math
import mmap
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm.model_executor.layers.fused_moe.expert_slots.capacity.estimates import (
    rows_per_sequence,
)
from vllm.model_executor.layers.fused_moe.expert_slots.capacity.footprint import (
    CannotMeasure,
    measure,
)
from vllm.model_executor.layers.fused_moe.expert_slots.capacity.gpus import (
    GpuMemory,
    usable_memory,
)
from vllm.model_executor.layers.fused_moe.expert_slots.capacity.host_memory import (
    available_after_waiting,
    host_memory,
    pinning_objection,
)
from vllm.model_executor.layers.fused_moe.expert_slots.capacity.plan import Limits
from vllm.model_executor.layers.fused_moe.expert_slots.capacity.planner import (
    CapacityPlanner,
    distinct_experts,
)
from vllm.model_executor.layers.fused_moe.expert_slots.config import (
    OPTIONS_KEY,
    SLOTS_KEY,
    MoEPrefetchConfig,
    MoEPrefetchError,
)
from vllm.model_executor.layers.fused_moe.expert_slots.refusals.models import (
    bypassed,
)
from vllm.model_executor.layers.fused_moe.expert_slots.shared_store.catalogue import (
    present,
)
from vllm.model_executor.layers.fused_moe.expert_slots.shared_store.identity import (
    checkpoint_directory,
    store_identity,
)
from vllm.model_executor.layers.fused_moe.expert_slots.shared_store.trust import (
    make_place,
)
from vllm.model_executor.layers.fused_moe.expert_slots.sizes import gib
from vllm.model_executor.layers.fused_moe.expert_slots.trace.file import (
    check_trace_file,
)
from vllm.model_executor.layers.fused_moe.expert_slots.warm_start import WARM_START
from vllm.plugins.moe_gpu_prefetch.command import gpu_elsewhere

logger = init_logger(__name__)

_GPU_PAGE = 2 << 20
"""Bytes of a page of CUDA's virtual memory, on all published devices."""

BATCHES = (1, 4, 16, 64)
"""Batch sizes for which the log says how many experts a step is expected to need."""


def planner_for(
    vllm_config: VllmConfig, config: MoEPrefetchConfig
) -> CapacityPlanner | None:
    """The planner for this model on this machine, or on the GPU elsewhere that this
    process answers for; None for a model without MoE layers.

    Raises:
        CannotMeasure: the model cannot be built from its configuration.
        MoEPrefetchError: expert slots do not run on this platform, on its GPUs, or for
            this model.
    """
    if current_platform.is_cuda():
        try:
            dtype: Any = vllm_config.model_config.dtype  # vLLM has settled it
            current_platform.check_if_supports_dtype(dtype)
        except ValueError as error:  # a worker would raise it later
            raise MoEPrefetchError(str(error)) from None
    elsewhere = gpu_elsewhere.answer_while_building if gpu_elsewhere.pretended else None
    measurement = measure(vllm_config, elsewhere)
    if measurement.bypassing:
        raise bypassed(vllm_config.model_config.model, config.slots)
    if not any(footprint.layers for footprint in measurement.footprints):
        return None
    limits = limits_of(vllm_config, config, measurement.gpu)
    planner = CapacityPlanner(measurement.footprints, limits, measurement.objection)
    need = planner.host_need(planner.top_k)
    if limits.host is not None and need <= limits.host.total:
        planner.limits = replace(
            limits, host=available_after_waiting(need, host_memory)
        )
    return planner


def limits_of(
    vllm_config: VllmConfig, config: MoEPrefetchConfig, gpu: GpuMemory | None
) -> Limits:
    """The limits of this machine, or of the one with the GPU elsewhere.

    Args:
        gpu: the memory of this machine's smallest GPU, if known.
    """
    cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
    scheduler = vllm_config.scheduler_config
    gpu_bytes, gpu_limit = usable_memory(vllm_config, gpu)
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


def _stores_present(vllm_config: VllmConfig, config: MoEPrefetchConfig) -> bool:
    """Whether the shared stores of all ranks are complete, so no more host memory is
    needed."""
    if config.shared_store is None:
        return False
    directory = checkpoint_directory(vllm_config, vllm_config.model_config)
    if directory is None:
        return False
    return all(
        present(
            Path(config.shared_store),
            store_identity(vllm_config, vllm_config.model_config, directory, rank),
        )
        for rank in range(vllm_config.parallel_config.world_size)
    )


def _refuse_a_full_place(
    config: MoEPrefetchConfig, planner: CapacityPlanner, slots: int
) -> None:
    """Refuses a shared store that its directory cannot hold.

    Raises:
        MoEPrefetchError: the directory has less room than the experts take.
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
            f"for {gib(free)}, and the experts take {gib(needed)}. Give it more room "
            "(mount -o remount,size=..., or --shm-size in a container), remove old "
            f"stores with vllm-moe-prefetch stores {config.shared_store} --remove, or "
            "serve without it."
        )


def _settle_trace(vllm_config: VllmConfig, file: str) -> None:
    """Checks the file of the trace and makes its name absolute in `vllm_config`: a
    worker may run in another directory.

    Raises:
        MoEPrefetchError: it can never be written.
    """
    path = Path(file).expanduser().absolute()
    check_trace_file(path)
    additional: Any = vllm_config.additional_config
    options = {**additional[OPTIONS_KEY], "trace": str(path)}
    vllm_config.additional_config = {**additional, OPTIONS_KEY: options}


def settle(vllm_config: VllmConfig) -> None:
    """Turns a size or `auto` into a number in `vllm_config`, refuses a capacity plan
    that does not fit, and logs the plan.

    Raises:
        MoEPrefetchError: the capacity plan does not fit. The message says what is
            needed, what there is, and the way out.
    """
    config = MoEPrefetchConfig.of(vllm_config)
    if config is None:
        return
    if config.trace is not None:
        _settle_trace(vllm_config, config.trace)
    try:
        planner = planner_for(vllm_config, config)
    except CannotMeasure as error:
        if not isinstance(config.slots, int):
            raise MoEPrefetchError(
                f"--moe-gpu-prefetch {config.slots}: {error}. Give a number."
            ) from None
        logger.warning(
            "No capacity plan, so nothing is checked before loading: %s", error
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
        make_place(Path(config.warm_start), WARM_START)
    _refuse_a_full_place(config, planner, slots)
    additional: Any = vllm_config.additional_config
    vllm_config.additional_config = {**additional, SLOTS_KEY: slots}
    _log(planner, slots, config)


def _log(planner: CapacityPlanner, slots: int, config: MoEPrefetchConfig) -> None:
    plan, limits = planner.plan(slots), planner.limits
    chosen = ""
    if config.slots == "auto":
        chosen = " (auto: the largest that leaves the KV cache its room)"
    elif isinstance(config.slots, str):
        chosen = f" ({config.slots}: the largest that fits into it)"
    logger.info(
        "Capacity plan: %d of %d expert slots per MoE layer%s; per rank %s of slots, "
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
            "of a layer, more than its %d slots. Each such step loads the rest through "
            "staging, which is slower. Lower --max-num-seqs to %d, or raise "
            "--moe-gpu-prefetch to %d.",
            limits.max_num_seqs,
            expected,
            plan.slots,
            plan.resident_sequences,
            min(planner.num_experts, math.ceil(expected)),
        )


def expectation(planner: CapacityPlanner) -> str:
    """Distinct experts that a decode step is expected to need, for some batch sizes."""
    counts = [
        f"{distinct_experts(planner.num_experts, planner.routed, batch):.0f} at {batch}"
        for batch in BATCHES
    ]
    return f"Distinct experts expected in a step: {', '.join(counts)} sequences"
