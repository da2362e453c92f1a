# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Proves and measures expert slots on a GPU, step by step. benchmarks/README.md says
what is kept. Each step ends within eight minutes; run again, it goes on with the
engines that it had no time for. Not yet run on a GPU.

memory   mapped and pinned memory as the slots use it; seconds, no model
kernels  plan and gather beside the CPU's decisions, thousands of random steps
micro    plan in µs; gather in GB/s beside the copy engine and a GEMM that reads host
         memory; launches of a step
exact    a small real checkpoint with CUDA graphs on: token ids and logprobs equal
         stock's
speed    decode and prefill at the expert shapes of Qwen3-30B-A3B, as ratios to stock
grid     vLLM issue #41447: expert shapes of gemma-4-26B-A4B, 16 requests of 64+64
         tokens
quant    quantised experts, format by format: the kernel alone, an engine's answers, the
         bytes of its loads, the memory of processing; `--quant FORMAT ...` runs it for
         some formats
all      the seven, in this order; ends after memory if that fails

On a machine without a GPU, `--cpu` runs exact, speed, grid and quant small, to try the
script itself. What that measures says nothing about a GPU and stays out of
benchmarks/results/. Quantised experts need a CPU with AMX there.
"""

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial

from benchmarks.gpu.engine import ENVIRONMENT

if __name__ == "__main__":  # a test that imports this keeps its own environment
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)

import torch
from rich.console import Console

from benchmarks import results
from benchmarks.gpu import memory, micro, quantised, serving
from benchmarks.results import Row

CHECKS = {
    "result": "ok",
    "equal to stock": True,
    "launches": 2,
    "experts stayed off": True,
    **quantised.CHECKS,
}
"""What these columns must say. Anything else makes the exit status 1."""

STEPS: dict[str, Callable[[bool], list[Row]]] = {
    "memory": memory.memory,
    "kernels": micro.kernels,
    "micro": micro.micro,
    "exact": serving.exact,
    "speed": serving.speed,
    "grid": serving.grid,
    "quant": quantised.quant,
}
"""Each takes whether there is no GPU, and returns rows."""

NEEDS_GPU = ("memory", "kernels", "micro")
NEEDS_ENGINES = ("exact", "speed", "grid", "quant")
"""These keep what each engine measured themselves."""

console = Console()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", nargs="?", choices=[*STEPS, "all"])
    parser.add_argument(
        "--quant",
        nargs="*",
        choices=quantised.QUANTISED,
        metavar="FORMAT",
        help="the step quant, for these formats or all: "
        + ", ".join(quantised.QUANTISED),
    )
    parser.add_argument(
        "--cpu", action="store_true", help="try the script without a GPU"
    )
    arguments = parser.parse_args()
    if (arguments.step is None) == (arguments.quant is None):
        parser.error("give a step, or --quant with formats or without")
    if not arguments.cpu and not torch.cuda.is_available():
        parser.error("no GPU here: run it on a GPU machine, or try it with --cpu")
    formats, steps = arguments.quant or [], STEPS
    if arguments.quant is not None:
        steps = {"quant": partial(quantised.quant, formats=formats)}
    wanted = list(steps)
    if arguments.step not in (None, "all"):
        wanted = [arguments.step]
    if arguments.cpu:
        wanted = [step for step in wanted if step not in NEEDS_GPU]
        if not wanted:
            parser.error(
                f"{arguments.step} needs a GPU; `make test` plays it without one"
            )
    failed = []
    for step in wanted:
        rows = steps[step](arguments.cpu)
        asked = " ".join(["--quant", *formats]) if formats else step
        command = f"python -m benchmarks.gpu.proof {asked}" + " --cpu" * arguments.cpu
        raw = () if step in NEEDS_ENGINES else rows
        text = results.save(serving.results_folder(), step, rows, command, raw=raw)
        console.print(text, markup=False, soft_wrap=True)
        if any(
            name in row and row[name] != right
            for row in rows
            for name, right in CHECKS.items()
        ):
            failed.append(step)
            if step == "memory":
                break
    console.print(f"FAILED: {', '.join(failed)}" if failed else "passed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
