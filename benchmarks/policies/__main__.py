# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Usage: python -m benchmarks.policies [TRACE...]. Loads of rules of eviction and
admission, relative to `lru`: on calibrated synthetic routing, or on traces that
`--moe-gpu-prefetch-config.trace` recorded."""

import argparse
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.policies.replay import Needs, Rule, loads
from benchmarks.policies.workloads import synthetic, traced

FRACTIONS = {"E/8": 1 / 8, "E/4": 1 / 4, "E/2": 1 / 2, "3E/4": 3 / 4}

LRU = "lru"
RULES = {
    LRU: Rule(),
    "lfu, half-life 128": Rule("lfu", half_life=128),
    "lfu, half-life 32": Rule("lfu", half_life=32),
    "lfu, half-life 16": Rule("lfu", half_life=16),
    "lfu, half-life 8": Rule("lfu", half_life=8),
    "lfu, half-life 4": Rule("lfu", half_life=4),
    "lru by the last need but one": Rule("lru2"),
    "slru, half protected": Rule("slru"),
    "slru, four fifths protected": Rule("slru", protected=0.8),
    "lru, twice in four steps": Rule(admission="twice"),
    "lfu 8, twice in four steps": Rule("lfu", half_life=8, admission="twice"),
    "lfu 128, if worth more": Rule("lfu", half_life=128, admission="worth"),
    "lfu 8, if worth more": Rule("lfu", half_life=8, admission="worth"),
    "lru, prefill's last tokens": Rule(wide_touches="tail"),
    "lru, prefill touches nothing": Rule(wide_touches="none"),
    "lru, prefill only reads": Rule(wide_touches="none", wide_places=False),
    "lfu 8, prefill's last tokens": Rule("lfu", half_life=8, wide_touches="tail"),
    "lfu 8, prefill touches nothing": Rule("lfu", half_life=8, wide_touches="none"),
    "belady, which no engine can": Rule("belady"),
}

Ratios = dict[str, dict[str, list[float]]]
"""By rule and number of slots: of each seed or layer."""


def ratios(workload: list[Needs]) -> Ratios:
    """Loads relative to `lru`, wide steps included. The first eighth of the steps is
    not counted."""
    result: Ratios = {name: {} for name in RULES}
    for label, fraction in FRACTIONS.items():
        counted = []
        for needs in workload:
            slots = max(1, int(needs.num_experts * fraction))
            skip = len(needs.wide) // 8
            counted.append(
                {n: int(loads(needs, slots, r)[skip:].sum()) for n, r in RULES.items()}
            )
        for name in RULES:
            result[name][label] = [each[name] / max(1, each[LRU]) for each in counted]
    return result


def applies(rule: Rule, workload: list[Needs]) -> bool:
    """Whether the rule can differ there: a rule for wide steps needs some."""
    if rule.wide_touches == "tail":
        return any(n.wide.any() and n.tail is not None for n in workload)
    special = rule.wide_touches != "all" or not rule.wide_places
    return not special or any(n.wide.any() for n in workload)


def table(title: str, workload: list[Needs], found: Ratios) -> Table:
    shown = Table(
        "loads relative to lru", *FRACTIONS, title=title, title_justify="left"
    )
    for name, cells in found.items():
        if applies(RULES[name], workload):
            texts = (
                f"{np.mean(cell):.3f} ({min(cell):.2f}-{max(cell):.2f})"
                for cell in cells.values()
            )
            shown.add_row(name, *texts)
    return shown


def summary(found: dict[str, Ratios], workloads: dict[str, list[Needs]]) -> Table:
    shown = Table(
        *("rule", "cells", "mean", "best", "worst", "2 % fewer", "2 % more"),
        title="all workloads and numbers of slots",
        title_justify="left",
    )
    for name, rule in RULES.items():
        means = [
            float(np.mean(cell))
            for workload, result in found.items()
            if applies(rule, workloads[workload])
            for cell in result[name].values()
        ]
        if means:
            mean = float(np.exp(np.mean(np.log(np.maximum(means, 1e-9)))))
            fewer, more = sum(m < 0.98 for m in means), sum(m > 1.02 for m in means)
            figures = (f"{m:.3f}" for m in (mean, min(means), max(means)))
            shown.add_row(name, f"{len(means)}", *figures, f"{fewer}", f"{more}")
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("traces", nargs="*", type=Path, metavar="TRACE")
    parser.add_argument(
        "--steps", type=int, default=1536, help="of synthetic routing (default: 1536)"
    )
    parser.add_argument(
        "--seeds", type=int, default=3, help="of synthetic routing (default: 3)"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)  # the tensors are small
    workloads = {path.name: traced(path) for path in options.traces}
    console = Console()
    found = {}
    for title, needs in (workloads or synthetic(options.steps, options.seeds)).items():
        workloads[title] = needs
        found[title] = ratios(needs)
        console.print(table(title, needs, found[title]))
    console.print(summary(found, workloads))


if __name__ == "__main__":
    main()
