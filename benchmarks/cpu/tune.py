# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""`python -m benchmarks.cpu.tune`: how long `vllm-moe-prefetch tune` takes for ten
million needed experts: 48 layers of 128 experts top-8, the default numbers of slots and
all policies. Uniform routing misses most and takes longest. Skewed routing has the odds
1 / (e + 1) ** 1.8 for expert e. The loops are compiled anew."""

import argparse
import os
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    _COMPILED = tempfile.TemporaryDirectory()
    os.environ["NUMBA_CACHE_DIR"] = _COMPILED.name

import numpy as np
from rich.console import Console
from rich.table import Table

from tests.support.traces import layer_of, layer_of_ids, write_trace
from vllm.plugins.moe_gpu_prefetch.command.tune.run import default_rows
from vllm.plugins.moe_gpu_prefetch.command.tune.simulate import (
    POLICIES,
    Point,
    SimulatedLayer,
    simulate,
)
from vllm.plugins.moe_gpu_prefetch.command.tune.study import studies

LAYERS, EXPERTS, TOP_K, SLOTS = 48, 128, 8, 48


def draw(random: np.random.Generator, tokens: int, exponent: float) -> np.ndarray:
    """[tokens, TOP_K] distinct ids, by the Gumbel top-k trick (arXiv 1903.06059)."""
    odds = -exponent * np.log(np.arange(1, EXPERTS + 1, dtype=np.float32))
    drawn = random.standard_exponential((tokens, EXPERTS), np.float32)
    noise = -np.log(np.maximum(drawn, 1e-30))
    return np.argpartition(-(odds + noise), TOP_K - 1, axis=1)[:, :TOP_K]


def make_trace(path: Path, entries: int, batch: int, exponent: float) -> int:
    """Writes a trace of about this many needed experts; returns how many it has."""
    random = np.random.default_rng(batch)
    some = draw(random, 100 * batch, exponent).reshape(100, -1)
    needed = sum(len(np.unique(each)) for each in some) / 100
    steps = max(1, round(entries / LAYERS / needed))
    layers = [
        layer_of_ids(
            draw(random, steps * batch, exponent).reshape(steps, batch * TOP_K),
            EXPERTS,
            name=f"layers.{number}",
            num_slots=SLOTS,
            top_k=TOP_K,
            routed=float(TOP_K),
        )
        for number in range(LAYERS)
    ]
    write_trace(path, layers)
    return sum(len(layer.experts) for layer in layers)


def measure(path: Path) -> tuple[float, float, int]:
    """Seconds of reading and of simulating, and the runs of each layer."""
    begin = time.perf_counter()
    [study] = studies([path])
    read = time.perf_counter()
    points = [Point(n, policy) for n in default_rows(study) for policy in POLICIES]
    study.run(points)
    _ = study.reuse
    return read - begin, time.perf_counter() - read, len(points)


def compile_loops() -> float:
    """Seconds that it takes, once on a machine."""
    begin = time.perf_counter()
    small = SimulatedLayer(layer_of([[0]], 2, 1), np.zeros(1, np.int8))
    simulate([small], [Point(1, "lru")])
    small.reuse()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--entries", type=int, default=10_000_000, help="needed experts"
    )
    entries = parser.parse_args().entries
    compiled = compile_loops()
    table = Table("routing", "batch", "needed", "runs", "seconds: compile", "read")
    for column in ("simulate", "sum"):
        table.add_column(column)
    with tempfile.TemporaryDirectory() as directory:
        for routing, exponent in (("uniform", 0.0), ("skewed", 1.8)):
            for batch in (1, 8):
                path = Path(directory) / "trace"
                made = make_trace(path, entries, batch, exponent)
                read, simulated, runs = measure(path)
                seconds = (compiled, read, simulated, compiled + read + simulated)
                cells = [routing, str(batch), f"{made:,}", str(runs)]
                table.add_row(*cells, *(f"{each:.1f}" for each in seconds))
    Console().print(table)


if __name__ == "__main__":
    main()
