# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What loading costs in time and memory, as ratios to stock in the same run: a
checkpoint of 2.5 GiB of experts, with a store of the engine's own and with a shared
one. About five minutes.
"""

import argparse
import os
import shutil
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import results
from tests.support import ROOT
from tests.support.engine_process import EngineProcess
from tests.support.sample import make_large

SLOTS = 2


def once(*arguments: object) -> dict[str, Any]:
    """What one engine measured while loading, and its share of memory afterwards."""
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
        "--repeats", type=int, default=3, help="runs of each engine (default: 3)"
    )
    parser.add_argument(
        "--width", type=int, default=768, help="of the experts (default: 768)"
    )
    results.save_option(parser)
    arguments = parser.parse_args()
    repeats = arguments.repeats
    work = ROOT / ".demo" / "loading"
    work.mkdir(parents=True, exist_ok=True)
    name = f"width-{arguments.width}"
    model = make_large(work / name, arguments.width)
    place = Path(f"/dev/shm/vllm-expert-stores-{os.getpid()}")
    runs: dict[str, list[dict[str, Any]]] = {}
    together = []
    for _ in range(repeats):
        runs.setdefault("the rest", []).append(once(model.with_name(f"{name}.small")))
        runs.setdefault("stock", []).append(once(model))
        runs.setdefault("slots", []).append(once(model, SLOTS))
        built, attached, memory = shared(model, place)
        runs.setdefault("shared, first", []).append(built)
        runs.setdefault("shared, second", []).append(attached)
        together.append(memory)

    def median(engine: str, field: str) -> float:
        return statistics.median(run[field] for run in runs[engine])

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
    for engine in ("stock", "slots", "shared, first", "shared, second"):
        seconds = median(engine, "load_s")
        table.add_row(
            engine,
            f"{seconds:.2f}",
            f"{seconds / stock:.2f}",
            f"{seconds - rest:.2f}",
            f"{median(engine, 'peak_bytes') / kept:.3f}",
        )
    console = Console(highlight=False)
    console.print(table)
    first, second = (
        median(f"shared, {start}", "load_s") - rest for start in ("first", "second")
    )
    unshared = median("slots", "load_s") - rest
    note = (
        f"The same model without its experts loads in {rest:.2f} s.\n"
        f"Second start: experts {unshared / second:.1f} times as fast as from the "
        f"checkpoint, "
        f"{first / second:.1f} times as fast as building the store.\n"
        f"Memory (PSS) of two engines on one store: "
        f"{statistics.median(together) / median('slots', 'pss'):.2f} of one engine's."
    )
    console.print(note)
    if arguments.save:
        console.print(f"kept in {results.save_tables('loading', [table], note)}")


if __name__ == "__main__":
    main()
