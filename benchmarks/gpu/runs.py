# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Runs the engines of a step, and keeps what each of them measured."""

import json
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import torch
from rich.console import Console

from benchmarks import results
from benchmarks.gpu.engine import WORK, run_engine
from benchmarks.results import Row

ENGINE_SECONDS, TIMED_SECONDS = 110, 170
"""An engine is not started when less than this is left: estimates of how long one takes
to load, compile, capture its graphs and answer, and one that is timed."""

TINY = {
    **{"hidden": 128, "width": 64, "experts": 32, "top_k": 4},
    **{"heads": 4, "head_dim": 32, "layers": 2},
}
"""The model of `--cpu`."""

SMALL_ENGINE = 8 << 30
"""Bytes of a GPU for an engine of `exact` or `quant`, with plenty to spare."""

console = Console()


@dataclass(frozen=True)
class Options:
    """How a step is asked to run.

    Attributes:
        cpu: small, on a machine without a GPU, to try the script.
        first: only the engines that show the most.
        deadline: of `time.monotonic()`. No engine is started that would not end by
            then.
        engines: fresh engines of every arm of `speed`.
        formats: of `quant`; all if none is named.
    """

    cpu: bool = False
    first: bool = False
    deadline: float = math.inf
    engines: int = 1
    formats: tuple[str, ...] = ()


def results_folder() -> Path:
    """What a CPU measures says nothing about a GPU, and is not among the results."""
    gpu = torch.cuda.is_available()
    return results.folder(results.RESULTS if gpu else WORK / "results")


def slots_option(slots: int) -> Row:
    return {"additional_config": {"moe_gpu_prefetch": slots}}


def beside_each_other() -> tuple[int, Row]:
    """How many small engines a GPU takes at once, at most 8, and the options that let
    them start side by side: with a given KV cache vLLM measures no memory."""
    total = torch.cuda.get_device_properties(0).total_memory
    count = max(1, min(8, total // SMALL_ENGINE))
    share = {"gpu_memory_utilization": 0.9 / count}
    return count, {**share, "kv_cache_memory_bytes": 1 << 28}


def run_engines(
    step: str,
    requests: list[Row],
    rows_of: Callable[[Row, list[Row]], list[Row]],
    options: Options,
    at_once: int = 1,
) -> list[Row]:
    """Runs the engines that have not been measured yet, while there is time. What was
    measured is kept after each of them.

    Args:
        step: its name.
        requests: one of an engine each, in the order in which they are run. The names
            are unique. "first" marks those that `--first` runs.
        rows_of: the rows of a request, whose measurement is under "measured", given all
            requests that have one.
        at_once: engines that run side by side. Only for what is not timed.

    Returns:
        The rows, and one of the engines that there was no time for. An engine that
        failed is run again the next time.
    """
    kept = results_folder() / "raw" / f"{step}.json"
    done: list[Row] = json.loads(kept.read_text()) if kept.exists() else []
    lock, left = Lock(), []

    def measured(request: Row) -> Row | None:
        return next((d for d in done if request.items() <= d.items()), None)

    def wanted(request: Row) -> bool:
        before = measured(request)
        failed = before is None or "failed" in before["measured"]
        return failed and (request.get("first", False) or not options.first)

    def run(request: Row) -> None:
        seconds = options.deadline - time.monotonic()
        if seconds < (TIMED_SECONDS if at_once == 1 else ENGINE_SECONDS):
            left.append(request["name"])
            return
        begin = time.monotonic()
        answer = run_engine(request, min(seconds, 480))
        with lock:
            if (failed := measured(request)) is not None:
                done.remove(failed)
            done.append({**request, "measured": answer})
            kept.write_text(json.dumps(done, indent=1) + "\n")
        console.print(
            f"{request['name']}: {answer.get('failed', 'measured')} "
            f"({time.monotonic() - begin:.0f} s)",
            markup=False,
            soft_wrap=True,
        )

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(run, filter(wanted, requests)))
    in_order = [found for request in requests if (found := measured(request))]
    rows = [row for request in in_order for row in rows_of(request, in_order)]
    if left:
        rows.append({"result": f"run {step} again, for {'; '.join(left)}"})
    return rows
