# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""`make bench`: what slots cost on the CPU platform: the time of one decision; then
stock and N = E-1, E/2, E/4 of one checkpoint, alternated in one run, as ratios to
stock.

Random weights route almost uniformly, so hit rates are the low end of what real models
reach.
"""

import argparse
import os
import statistics
import time
import warnings
from typing import Any

from tests.support import ROOT

for name, value in (
    ("VLLM_ENABLE_V1_MULTIPROCESSING", "0"),
    ("VLLM_LOGGING_LEVEL", "ERROR"),
    ("VLLM_CPU_KVCACHE_SPACE", "1"),
    ("HF_HUB_OFFLINE", "1"),
    ("TORCH_CPP_LOG_LEVEL", "ERROR"),
):
    os.environ.setdefault(name, value)
warnings.simplefilter("ignore")

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import results
from tests.support.engine import moe_layers, start
from tests.support.sample import make_checkpoint
from vllm import SamplingParams
from vllm.model_executor.layers.fused_moe.expert_slots.config import (
    MoEPrefetchConfig,
)
from vllm.model_executor.layers.fused_moe.expert_slots.cpu.manager import (
    CPUSlotManager,
)
from vllm.model_executor.layers.fused_moe.expert_slots.cpu.memory import CPUMemory
from vllm.model_executor.layers.fused_moe.expert_slots.weights.rows import (
    ExpertRows,
)
from vllm.model_executor.layers.fused_moe.expert_slots.weights.store import (
    ExpertStore,
)

EXPERTS, TOP_K, LAYERS = 32, 4, 4
BATCHES = (1, 8)
console = Console()


def seconds(llm: Any, requests: int, tokens: int, seed: int) -> float:
    """For `requests` prompts of 16 random tokens, decoded together."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [
        {
            "prompt_token_ids": torch.randint(
                3, 1024, (16,), generator=generator
            ).tolist()
        }
        for _ in range(requests)
    ]
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    begin = time.perf_counter()
    llm.generate(prompts, sampling, use_tqdm=False)
    return time.perf_counter() - begin


def totals(llm: Any) -> dict[str, int]:
    """The counters of all layers together; empty for stock's engine."""
    managers = [getattr(layer, "slot_manager", None) for layer in moe_layers(llm)]
    layers = [manager.counters.as_dict() for manager in managers if manager is not None]
    return {name: sum(layer[name] for layer in layers) for name in (layers or [{}])[0]}


def start_engines() -> dict[str, Any]:
    checkpoint = make_checkpoint(
        ROOT / ".demo" / "qwen3-moe-bench",
        EXPERTS,
        TOP_K,
        layers=LAYERS,
        expert_width=256,
    )
    slots_of = {"stock": None} | {
        f"N = {n}": n for n in (EXPERTS - 1, EXPERTS // 2, EXPERTS // 4)
    }
    return {
        name: start(checkpoint, slots=slots, use_tqdm_on_load=False)
        for name, slots in slots_of.items()
    }


def throughput(
    engines: dict[str, Any], requests: int, tokens: int, rounds: int
) -> Table:
    """All engines stand side by side. Each round asks all of them the same, beginning
    with another one, and gives one ratio for each."""
    spent: dict[str, list[float]] = {name: [] for name in engines}
    for llm in engines.values():
        seconds(llm, requests, tokens, seed=0)
    warm = {name: totals(llm) for name, llm in engines.items()}
    names = list(engines)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            spent[name].append(
                seconds(engines[name], requests, tokens, seed=number + 1)
            )
    table = Table(
        *(
            "",
            "tokens/s",
            "of stock (quartiles)",
            "hit rate",
            "loads/token",
            "overflows",
        ),
        title=(
            f"Decode, batch of {requests} ({EXPERTS} experts top-{TOP_K}, {rounds} "
            f"rounds of {tokens} tokens each)"
        ),
    )
    for name, llm in engines.items():
        ratios = [a / b for a, b in zip(spent["stock"], spent[name], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        speed = requests * tokens / statistics.median(spent[name])
        row = [name, f"{speed:.0f}", f"{middle:.2f} ({low:.2f}-{high:.2f})"]
        if now := totals(llm):
            moved = {key: now[key] - warm[name][key] for key in now}
            row += [
                f"{moved['hits'] / moved['needed']:.1%}",
                f"{moved['loads'] / (rounds * requests * tokens):.2f}",
                f"{moved['overflow_steps'] / moved['steps']:.0%}",
            ]
        table.add_row(*row)
    return table


def decision_microseconds(tokens: int, policy: str, traced: bool, steps: int) -> float:
    """Median cost of one layer's decision and remap, without the loads; E=128, top-8,
    N=64; and of its record in a trace.

    The routing of a step repeats three quarters of the last one's, as real routing
    does."""
    experts, slots, top_k = 128, 64, 8
    store = ExpertStore({"w13_weight": torch.zeros(experts, 1)})
    trace = "not written" if traced else None
    config = MoEPrefetchConfig(slots=slots, policy=policy, trace=trace)
    manager = CPUSlotManager(config, ExpertRows(store, slots, CPUMemory()))
    generator = torch.Generator().manual_seed(0)
    ids = (
        torch.rand(tokens, experts, generator=generator)
        .topk(top_k)
        .indices.to(torch.int32)
    )
    spent = []
    for _ in range(steps):
        fresh = torch.rand(tokens, experts, generator=generator).topk(top_k).indices
        changed = torch.rand(tokens, 1, generator=generator) < 0.25
        ids = torch.where(changed, fresh.to(torch.int32), ids)
        begin = time.perf_counter()
        manager.plan(ids)
        manager.remap(ids)
        spent.append(time.perf_counter() - begin)
    return statistics.median(spent) * 1e6


def decisions(steps: int) -> Table:
    sizes = (1, 16, 64)
    title = (
        "One decision with its remap, µs per layer and step (E=128, top-8, N=64; "
        "median)"
    )
    table = Table("policy", *(f"{n} tokens" for n in sizes), title=title, min_width=60)
    for policy, traced in (("lru", False), ("lfu", False), ("lfu", True)):
        costs = [decision_microseconds(n, policy, traced, steps) for n in sizes]
        name = f"{policy}, traced" if traced else policy
        table.add_row(name, *(f"{cost:.0f}" for cost in costs))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rounds", type=int, default=36, help="rounds through all engines"
    )
    parser.add_argument(
        "--tokens", type=int, default=32, help="tokens per sequence and round"
    )
    parser.add_argument("--steps", type=int, default=2000, help="decisions to time")
    results.save_option(parser)
    arguments = parser.parse_args()
    # Decisions first: the engines start threads that would disturb so short a
    # measurement.
    tables = [decisions(arguments.steps)]
    console.print(tables[0])
    engines = start_engines()
    for requests in BATCHES:
        tables.append(throughput(engines, requests, arguments.tokens, arguments.rounds))
        console.print(tables[-1])
    if arguments.save:
        console.print(f"kept in {results.save_tables('overhead', tables)}")


if __name__ == "__main__":
    main()
