# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Proves and measures expert slots on a GPU, step by step. benchmarks/README.md says
what is kept. Not yet run on a GPU.

memory   mapped and pinned memory as the slots use it; seconds, no model
kernels  plan and gather beside the CPU's decisions, thousands of random steps
micro    plan in µs; gather in GB/s beside the copy engine and a GEMM that reads host
         memory; launches of a step, and whether it waits for the host
exact    a small real checkpoint: token ids and logprobs equal stock's, for the graphs,
         model runners and numbers of slots of `exact.py`
quant    quantised experts, format by format: the kernel alone, an engine's answers, the
         bytes of its loads, the memory of processing; `--quant FORMAT ...` runs it for
         some formats
speed    decode and prefill at the expert shapes of Qwen3-30B-A3B, as ratios to stock;
         the bound, and where the time goes
grid     vLLM issue #41447: expert shapes of gemma-4-26B-A4B, 16 requests of 64+64
         tokens
all      the seven, in this order; ends after memory if that fails

`all --first` runs what shows the most, and no grid, in ten minutes or so. An engine is
measured once in a day and commit: run again, a step goes on with those that are left.

On a machine without a GPU, `--cpu` runs exact, quant, speed and grid small, to try the
script itself. What that measures says nothing about a GPU and stays out of
benchmarks/results/. Quantised experts need a CPU with AMX there.
"""

import argparse
import gc
import math
import os
import sys
import time
import traceback
from collections.abc import Callable

from benchmarks.gpu.engine import ENVIRONMENT

if __name__ == "__main__":  # a test that imports this keeps its own environment
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)

import torch
from rich.console import Console

from benchmarks import results
from benchmarks.gpu import exact, memory, micro, quantised, runs, speed
from benchmarks.results import Row

CHECKS = {
    "launches": 2,
    **exact.CHECKS,
    **speed.CHECKS,
    **quantised.CHECKS,
}
"""What these columns must say. Anything else makes the exit status 1."""

STEPS: dict[str, Callable[[runs.Options], list[Row]]] = {
    "memory": memory.memory,
    "kernels": micro.kernels,
    "micro": micro.micro,
    "exact": exact.exact,
    "quant": quantised.quant,
    "speed": speed.speed,
    "grid": speed.grid,
}

NEEDS_GPU = ("memory", "kernels", "micro")
NEEDS_ENGINES = ("exact", "quant", "speed", "grid")
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
    parser.add_argument(
        "--first", action="store_true", help="only what shows the most, and no grid"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=math.inf,
        metavar="M",
        help="start no engine that would not end within M minutes from now",
    )
    parser.add_argument(
        "--engines",
        type=int,
        default=1,
        metavar="K",
        help="fresh engines of each arm of speed; medians and ranges are of these",
    )
    arguments = parser.parse_args()
    if (arguments.step is None) == (arguments.quant is None):
        parser.error("give a step, or --quant with formats or without")
    if not arguments.cpu and not torch.cuda.is_available():
        parser.error("no GPU here: run it on a GPU machine, or try it with --cpu")
    options = runs.Options(
        cpu=arguments.cpu,
        first=arguments.first,
        deadline=time.monotonic() + 60 * arguments.minutes,
        engines=arguments.engines,
        formats=tuple(arguments.quant or ()),
    )
    wanted = list(STEPS)
    if arguments.step != "all":
        wanted = [arguments.step or "quant"]
    if arguments.cpu:
        wanted = [step for step in wanted if step not in NEEDS_GPU]
        if not wanted:
            parser.error(
                f"{arguments.step} needs a GPU; `make test` plays it without one"
            )
    failed = []
    for step in wanted:
        try:
            rows = STEPS[step](options)
        except Exception as error:  # what it is stays in the results, and others run
            traceback.print_exc()
            rows = [{"result": f"{type(error).__name__}: {error}"}]
        if step in NEEDS_GPU:  # its memory is for the engines now
            gc.collect()
            torch.cuda.empty_cache()
        if not rows:
            continue
        asked = " ".join(["--quant", *options.formats]) if options.formats else step
        if arguments.engines > 1:
            asked += f" --engines {arguments.engines}"
        command = f"python -m benchmarks.gpu.proof {asked}" + " --cpu" * arguments.cpu
        raw = () if step in NEEDS_ENGINES else rows
        text = results.save(runs.results_folder(), step, rows, command, raw=raw)
        console.print(text, markup=False, soft_wrap=True)
        if step == "speed":
            from benchmarks.gpu import plot  # matplotlib may be missing

            plot.draw(rows, runs.results_folder() / "speed.svg")
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
