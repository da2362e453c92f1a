# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Looks at an engine from inside: what its model takes of GPU memory, beside the plan,
and which kernels a step spends its time in."""

import functools
import gc
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.results import Row

GIB = 1 << 30
MAY_DIFFER = 0.02
"""By how much of the plan the memory may differ from it."""

NOT_SEEN = {"memory as planned": False, "experts stayed off": False}
"""Of an engine with slots, until its load has been watched."""

OURS = {"plan_kernel": "plan", "gather_kernel": "loads"}
"""Parts of a step's time, by the names of kernels. torch has a kernel whose name ends
in gather_kernel."""

PARTS = {
    "experts": ("moe", "expert", "marlin", "silu", "block_map"),
    "attention": ("attention", "reshape_and_cache"),
}
"""Other parts, by pieces of names."""


def watch_loading(measured: Row) -> None:
    """Has the next load note what the model takes of GPU memory, what the plan said,
    and the peak of torch's part: the experts must never all be there. Rows lie in
    mapped memory, which is not torch's."""
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    from vllm.plugins.moe_gpu_prefetch import start

    load_model, planner_for = BaseModelLoader.load_model, start.planner_for
    planners: list[Any] = []

    @functools.wraps(planner_for)
    def planned(*args: Any, **kwargs: Any) -> Any:
        planners.append(planner_for(*args, **kwargs))
        return planners[-1]

    @functools.wraps(load_model)
    def watched(*args: Any, **kwargs: Any) -> Any:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model = load_model(*args, **kwargs)
        gc.collect()
        peak = torch.cuda.max_memory_allocated() - before
        kept = torch.cuda.memory_allocated() - before
        slotted = [m for m in model.modules() if getattr(m, "slot_manager", None)]
        if slotted and planners[-1:] not in ([], [None]):
            plan = planners[-1].plan(slotted[0].num_slots)
            rows = slotted[0]._memory.committed  # of all layers
            measured["memory"] = compared(plan, rows, kept, peak)
        return model

    start.planner_for, BaseModelLoader.load_model = planned, watched


def compared(plan: Any, rows: int, kept: int, peak: int) -> Row:
    """The plan of an engine beside the bytes of its rows, and what it kept and took at
    most of torch's memory while it was loaded."""
    planned = plan.slot_bytes + plan.staging_bytes + plan.other_weight_bytes
    return {
        "GiB planned": planned / GIB,
        "GiB taken": (rows + kept) / GIB,
        "GiB of torch's peak": peak / GIB,
        "memory as planned": abs(rows + kept - planned) <= MAY_DIFFER * planned,
        "experts stayed off": peak < kept + GIB // 2,
    }


def parts_of(work: Callable[[], Any], steps: int) -> Row:
    """Does `work`, if the profiler lets it, and tells where the GPU's time went, in ms
    for each of its steps; or why that is not known."""
    try:
        return in_parts(profiled(work), steps)
    except Exception as error:  # what has been measured is worth more
        return {"parts": f"{type(error).__name__}: {error}"}


def profiled(work: Callable[[], Any]) -> dict[str, float]:
    """Does `work`. The µs of each kernel; on the CPU, of each operator."""
    gpu = torch.cuda.is_available()
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(
        activities=[activity.CUDA if gpu else activity.CPU]
    ) as p:
        work()
        if gpu:
            torch.cuda.synchronize()
    return {
        event.key: event.self_device_time_total if gpu else event.self_cpu_time_total
        for event in p.key_averages()
        if not gpu or event.device_type == torch.autograd.DeviceType.CUDA
    }


def in_parts(kernels: dict[str, float], steps: int) -> Row:
    """Sums up kernels.

    Args:
        kernels: µs by name.
        steps: that they took.
    """
    spent = dict.fromkeys((*OURS.values(), *PARTS, "other"), 0.0)
    for name, time in kernels.items():
        fitting = (
            part for part in PARTS if any(p in name.lower() for p in PARTS[part])
        )
        part = OURS.get(name) or next(fitting, "other")
        spent[part] += time / steps / 1e3
    parts = {f"{part}, ms": time for part, time in spent.items()}
    return {"GPU ms": sum(spent.values()), **parts}
