# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What quantised experts from slots give, beside stock on the same kernel: one engine
of each for every format.

An engine of stock is asked for everything once, and for a long prompt several times.
Where stock repeats itself, slots must be equal. Where it does not (Marlin aligns a long
prompt's rows in the order in which atomic additions happen to end), slots must be as
near to one of stock's runs as stock's runs are to each other.
"""

from itertools import combinations

import torch

from benchmarks.gpu.quantised_engine import checkpoint
from benchmarks.gpu.runs import Options, beside_each_other, run_engines
from benchmarks.results import Row
from tests.support.fp8_checkpoints import FP8_FORMATS
from tests.support.quantised import FORMATS, ON_CPU

FIRST = ("fp8-block", "gptq", "mxfp4")
"""The formats of `--first`: those that most checkpoints have."""

SLOTS = 4
"""Of 16 experts: a long prompt needs all of them."""

QUANTISED = tuple(FORMATS | FP8_FORMATS)
"""The formats, by their names in the checkpoints of the tests."""

_ON_BOTH = ("int4-ct", "int4-ct-asym")
FIRST_FP8 = (8, 9)
"""The compute capability from which stock's Triton kernel takes FP8."""

CHECKS = {
    "batch 1 equal to stock": True,
    "prefill as stock's": True,
    "staging is shared": True,
    "bytes are those of misses": True,
    "kernel equal to stock's": True,
    "processing within the plan": True,
}
"""What these columns must say."""

ON_A_GPU: Row = {
    "attention_backend": "TRITON_ATTN",
    **{"max_model_len": 2048, "max_num_batched_tokens": 1024, "max_num_seqs": 4},
    # Prompts run eagerly, answers in CUDA graphs. Nothing is compiled, to save time.
    "enforce_eager": False,
    "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
}
"""Options of an engine. A prompt of 1000 tokens is one step of 2000 rows: more than
stock aligns in one block of threads."""

ON_THE_CPU: Row = {"max_model_len": 256, "max_num_batched_tokens": 128}


def backends(name: str, capability: tuple[int, int]) -> tuple[str, ...]:
    """The values of --moe-backend under which a format is run."""
    if name.startswith("fp8"):
        return ("triton",) if capability >= FIRST_FP8 else ("marlin",)
    if name == "int8":
        return ("triton",)
    return ("marlin", "triton") if name in _ON_BOTH else ("marlin",)


def quant(options: Options) -> list[Row]:
    """One row for each format and kernel. The CPU platform's kernels take fewer
    formats, and need AMX or a test's plugin."""
    cpu = options.cpu
    at_once, sizes = (1, {}) if cpu else beside_each_other()
    wanted = [
        name for name in options.formats or QUANTISED if not cpu or name in ON_CPU
    ]
    engines: list[tuple[str, str, Row]] = []
    for name in wanted:
        if cpu:
            engines.append((name, "the CPU's", ON_THE_CPU))
            continue
        for backend in backends(name, torch.cuda.get_device_capability()):
            engines.append((name, backend, ON_A_GPU | sizes | {"moe_backend": backend}))
    length, kernel_tokens = (96, [1, 9, 40]) if cpu else (1000, [1, 9, 200, 1000])
    requests = [
        {
            **{"name": f"{name}, {backend}, {who}", "quantised": name},
            **{"options": of_engine, "prefill": length, "tokens": 8 if cpu else 32},
            **({"slots": SLOTS, "kernel_tokens": kernel_tokens} if slots else {}),
            "first": name in FIRST,
        }
        for name, backend, of_engine in engines
        for who, slots in (("stock", False), ("slots", True))
    ]
    for name in wanted:
        if name in FIRST or not options.first:
            checkpoint(name)  # before engines side by side look for it

    return run_engines("quant", requests, rows_of, options, at_once)


def rows_of(request: Row, done: list[Row]) -> list[Row]:
    """The row of an engine with slots; none before its stock has answered."""
    name, backend, who = request["name"].split(", ")
    stock = next((d for d in done if d["name"] == f"{name}, {backend}, stock"), None)
    if who == "stock" or stock is None:
        return []
    row: Row = {"format": name, "--moe-backend": backend, "N": SLOTS}
    return [row | judged(stock["measured"], request["measured"])]


def judged(stock: Row, slots: Row) -> Row:
    """What the answers and counts of two engines say (`quantised_engine.py`)."""
    for who, measured in (("stock", stock), ("slots", slots)):
        if "failed" in measured:
            why = f"{who}: {measured['failed']}"
            return {"batch 1 equal to stock": False, "failed": why}
    row: Row = {"kernel": slots["kernel"], "stock's kernel": stock["kernel"]}
    row["batch 1 equal to stock"] = (
        slots["batch 1"] == stock["batch 1"]
        and slots["kernel"] == f"Slotted{stock['kernel']}"
    )
    row |= of_prefill(stock["prefills"], slots["prefills"][0])
    row |= {"misses": slots["misses"], "bytes/expert": slots["bytes per expert"]}
    row["staging is shared"] = slots["staging is shared"]
    row["bytes are those of misses"] = (
        slots["bytes loaded"] == slots["misses"] * slots["bytes per expert"] > 0
    )
    row |= slots["kernel steps"]
    return row | slots.get("processing", {})


def of_prefill(stock: list[list[float]], slots: list[float]) -> Row:
    """What slots gave for a prompt, beside several runs of stock. Each is logprobs."""
    if all(run == stock[0] for run in stock):
        return {"stock repeats itself": True, "prefill as stock's": slots == stock[0]}
    own = max(distance(*runs) for runs in combinations(stock, 2))
    from_stock = min(distance(slots, run) for run in stock)
    return {
        "stock repeats itself": False,
        "stock's own distance": own,
        "distance from stock": from_stock,
        "prefill as stock's": from_stock <= own,
    }


def distance(one: list[float], other: list[float]) -> float:
    """The largest difference of two runs' logprobs. Not a number if one of them is."""
    both = torch.tensor([one, other], dtype=torch.float64)
    return both.diff(dim=0).abs().max().item()
