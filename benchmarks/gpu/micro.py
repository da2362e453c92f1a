# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What the kernels cost on a GPU, and that they decide as the CPU does."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from vllm.utils.torch_utils import get_accelerator_view_from_cpu_tensor

from benchmarks.gpu.runs import Options
from benchmarks.results import Row
from tests.support import pair
from tests.support.pair import make_rows
from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchConfig
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.backend import CudaBackend
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.driver import cuda_driver
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.manager import (
    CudaSlotManager,
)
from vllm.model_executor.layers.fused_moe.expert_slots.weights.host_pages import (
    host_tensor,
)
from vllm.model_executor.layers.fused_moe.expert_slots.weights.memory import Memory
from vllm.model_executor.layers.fused_moe.expert_slots.weights.store import ExpertStore


def device_memory() -> Memory:
    torch.zeros(1, device="cuda")  # makes the context
    return CudaBackend().memory(torch.device("cuda"))


def kernels(options: Options) -> list[Row]:
    """Plan and gather beside the CPU's decisions, compared after every step."""
    rows = []
    for experts, slots, top_k in (
        (128, 64, 8),
        (128, 16, 8),
        (60, 15, 4),
        (512, 300, 16),
    ):
        for policy in ("lru", "lfu"):
            both = pair.Pair(
                *(experts, slots, policy),
                half_life=64,
                memory=device_memory(),
                traced=policy == "lru",
            )
            generator = torch.Generator().manual_seed(slots)
            steps = 200 if options.first else 600
            for step in range(steps):
                tokens = 600 if step % 100 == 99 else 1 + step % 5
                ids = pair.routing(generator, tokens, experts, top_k, 0.1)
                mask = (
                    torch.rand(tokens, generator=generator) < 0.2
                    if step % 3 == 0
                    else None
                )
                both.step((ids + step // 50) % experts, mask)
            counted = both.device.counters.as_dict()
            rows.append(
                {
                    **{"E": experts, "N": slots, "top-k": top_k, "policy": policy},
                    **{"equal steps": steps, "staged steps": counted["staged_steps"]},
                }
            )
    return rows


def microseconds(launch: Callable[[], Any], repeat: int = 200) -> float:
    """Time of one launch inside a CUDA graph of `repeat` of them."""
    launch()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeat):
            launch()
    graph.replay()
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / repeat * 1e3


def launches(step: Callable[[], Any]) -> int:
    """Nodes of a CUDA graph of one step."""
    step()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        step()
    driver = cuda_driver()
    handle = driver.module.CUgraph(graph.raw_cuda_graph())
    return driver.call("cuGraphGetNodes", handle, 0)[1]


def host_waits(step: Callable[[], Any]) -> str:
    """ "ok", or what makes the host wait for the device in a step."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        return str(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "ok"


def micro(options: Options) -> list[Row]:
    """Times of plan and gather, and of what else could bring an expert."""
    hidden, width, experts = 2048, 768, 128
    shapes = {"w13_weight": (2 * width, hidden), "w2_weight": (hidden, width)}
    tensors = {
        name: host_tensor((experts, *shape), torch.bfloat16)
        for name, shape in shapes.items()
    }
    store, memory = ExpertStore(tensors), device_memory()

    def make_manager(slots: int, policy: str) -> CudaSlotManager:
        config = MoEPrefetchConfig(slots=slots, policy=policy)
        return CudaSlotManager(config, make_rows(store, slots, memory))

    rows: list[Row] = []
    for policy in ("lru", "lfu"):
        manager = make_manager(64, policy)
        for tokens in (1, 8, 64, 8192):
            ids = torch.rand(tokens, experts, device="cuda").topk(8).indices.int()
            hits = torch.arange(8, device="cuda", dtype=torch.int32).repeat(tokens, 1)
            for what, routed in (("all hits", hits), ("random ids", ids)):
                spent = microseconds(partial(manager.plan, routed))
                rows.append(
                    {"what": f"plan, {policy}, {tokens} tokens, {what}", "µs": spent}
                )

    # With eight slots, two sets of eight experts evict each other, and of 64 experts 56
    # are staged.
    manager = make_manager(8, "lru")
    every = torch.arange(experts, device="cuda", dtype=torch.int32)
    misses = [every[16:24].view(1, 8), every[24:32].view(1, 8)]
    staged = [every[:64].view(8, 8), every[64:].view(8, 8)]
    hits = [every[:8].view(1, 8)]
    for what, sets in (
        ("all hit", hits),
        ("8 experts", misses),
        ("64, 56 of them staged", staged),
    ):

        def plan(sets: list[torch.Tensor] = sets) -> None:
            sets.reverse()
            manager.plan(sets[0])

        def step(sets: list[torch.Tensor] = sets) -> None:
            sets.reverse()
            manager.step(sets[0])

        planned = microseconds(plan, 40)
        rows.append({"what": f"plan, lru, {what}", "µs": planned})
        manager.reset()
        spent = microseconds(step, 40) - planned
        totals = manager.counters.as_dict()
        size = totals["bytes_loaded"] / totals["steps"]
        row = {"what": f"gather, {what}", "µs": spent, "GB/s": size / spent / 1e3}
        rows.append(row | {"launches": launches(step), "result": host_waits(step)})

    targets = {
        name: torch.empty_like(t[:8], device="cuda") for name, t in tensors.items()
    }

    def copy() -> None:
        for name, tensor in tensors.items():
            targets[name].copy_(tensor[16:24], non_blocking=True)

    spent, size = microseconds(copy, 20), 8 * store.bytes_per_expert
    rows.append(
        {"what": "copy engine, 8 experts", "µs": spent, "GB/s": size / spent / 1e3}
    )

    view = get_accelerator_view_from_cpu_tensor(tensors["w13_weight"])[:8].flatten(0, 1)
    x = torch.zeros(16, hidden, dtype=torch.bfloat16, device="cuda")
    spent, size = microseconds(lambda: x @ view.T, 20), view.nbytes
    rows.append(
        {"what": "GEMM on host memory", "µs": spent, "GB/s": size / spent / 1e3}
    )
    return rows


def link_bytes_per_ms() -> float:
    """The rate of the link to the host: what the copy engine reaches from pinned
    memory."""
    home = torch.empty(1 << 28, dtype=torch.uint8).pin_memory()
    target = torch.empty_like(home, device="cuda")
    return (
        home.numel()
        / microseconds(lambda: target.copy_(home, non_blocking=True), 8)
        * 1e3
    )
