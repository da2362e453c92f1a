# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Usage: python -m benchmarks.routing [--calibrate]. Prints what is published of real
models beside the same of the odds, and hit rates of the engine's decisions."""

import argparse

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.policies.replay import Needs
from benchmarks.routing.odds import STRATEGIES, Odds, stream
from benchmarks.routing.published import (
    ENGINE,
    MODELS,
    calibrate,
    drawn,
    figures,
    rate,
)

BATCHES = (1, 8, 32)
LENGTH = 128


def hit_rates(steps: int) -> Table:
    """Hit rates of one layer of 128 experts top-8."""
    table = Table("routing", "policy", "N", *(f"batch of {b}" for b in BATCHES))
    for name, odds in STRATEGIES.items():
        needs = {
            batch: Needs.of(
                stream(odds, 128, 8, batch, -(-steps // LENGTH), LENGTH).numpy(), 128
            )
            for batch in BATCHES
        }
        for policy, rule in ENGINE.items():
            for slots in (96, 64, 51, 32, 16):
                rates = [
                    f"{rate([needs[b]], slots, rule, False, 8):.1%}" for b in BATCHES
                ]
                table.add_row(name, policy, str(slots), *rates)
        unions = [f"{needs[b].sizes.mean():.1f}" for b in BATCHES]
        table.add_row(name, "experts a step", "", *unions, end_section=True)
    return table


def beside_published() -> Table:
    """Every published figure of `MODELS`, and ours."""
    table = Table("routing", "figure", "published", "drawn")
    for name, model in MODELS.items():
        ours = figures(drawn(model, STRATEGIES[name]))
        for what, value in figures(model).items():
            form = ".1%" if value < 1 else ".1f"
            table.add_row(name, what, format(value, form), format(ours[what], form))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--steps", type=int, default=2048, help="of a layer (default: 2048)"
    )
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="search for better odds first, minutes; they are printed, not kept",
    )
    options = parser.parse_args()
    torch.set_num_threads(1)  # the tensors are small
    console = Console()

    def say(odds: Odds, distance: float) -> None:
        console.print(f"{distance:.4f} {odds}")

    if options.calibrate:
        for name, model in MODELS.items():
            console.print(name)
            calibrate(model, STRATEGIES[name], say)
    console.print(beside_published())
    console.print(hit_rates(options.steps))


if __name__ == "__main__":
    main()
