# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What loading costs in time and memory, as ratios to stock in the same run: a
checkpoint of 2.5 GiB of experts, with stores of their own and with a shared one. About
five minutes.

Usage: python -m benchmarks.cpu.loading [--repeats N]
"""

import argparse
import os
import shutil
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.support import ROOT
from tests.support.engine_process import EngineProcess
from tests.support.sample import make_large

SLOTS = 2


def once(*arguments: object) -> dict[str, Any]:
    """One engine: what it measured while loading, and its share of memory
    afterwards."""
    engine = EngineProcess(*arguments)
    answer = engine.answer() | {"pss": engine.pss()}
    engine.end()
    return answer


def shared(model: Path, place: Path) -> tuple[dict[str, Any], dict[str, Any], int]:
    """A building engine and, beside it, one that attaches; the memory of both
    together."""
    shutil.rmtree(place, ignore_errors=True)
    first = EngineProcess(model, SLOTS, place)
    built = first.answer()
    second = EngineProcess(model, SLOTS, place)
    attached = second.answer()
    together = first.pss() + second.pss()
    for engine in (first, second):
        engine.end()
    shutil.rmtree(place)
    return built, attached, together


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--repeats", type=int, default=3, help="runs of each arm (default: 3)"
    )
    repeats = parser.parse_args().repeats
    work = ROOT / ".demo" / "loading"
    work.mkdir(parents=True, exist_ok=True)
    model = make_large(work / "large")
    place = Path(f"/dev/shm/vllm-expert-stores-{os.getpid()}")
    runs: dict[str, list[dict[str, Any]]] = {}
    together = []
    for _ in range(repeats):
        runs.setdefault("the rest", []).append(once(model.with_name("large.small")))
        runs.setdefault("stock", []).append(once(model))
        runs.setdefault("slots", []).append(once(model, SLOTS))
        built, attached, memory = shared(model, place)
        runs.setdefault("shared, first", []).append(built)
        runs.setdefault("shared, second", []).append(attached)
        together.append(memory)

    def median(arm: str, field: str) -> float:
        return statistics.median(run[field] for run in runs[arm])

    rest, stock = median("the rest", "load_s"), median("stock", "load_s")
    slots = runs["slots"][0]
    kept = slots["store_bytes"] + slots["other_bytes"]
    table = Table(
        title=f"{slots['store_bytes']:,} bytes of experts; median of {repeats}"
    )
    for column in (
        "",
        "loading s",
        "of stock",
        "experts alone s",
        "peak, of what is kept",
    ):
        table.add_column(column, justify="right")
    for arm in ("stock", "slots", "shared, first", "shared, second"):
        seconds = median(arm, "load_s")
        table.add_row(
            arm,
            f"{seconds:.2f}",
            f"{seconds / stock:.2f}",
            f"{seconds - rest:.2f}",
            f"{median(arm, 'peak_bytes') / kept:.3f}",
        )
    console = Console(highlight=False)
    console.print(table)
    first, second = (
        median(f"shared, {arm}", "load_s") - rest for arm in ("first", "second")
    )
    unshared = median("slots", "load_s") - rest
    console.print(
        f"The same model without its experts loads in {rest:.2f} s.\n"
        f"Second start: experts {unshared / second:.1f} times as fast as from the "
        f"checkpoint, "
        f"{first / second:.1f} times as fast as building the store.\n"
        f"Memory (PSS) of two engines on one store: "
        f"{statistics.median(together) / median('slots', 'pss'):.2f} of one engine's."
    )


if __name__ == "__main__":
    main()
