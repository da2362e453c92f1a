# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Draws the panels of the dashboard, of a model that is served here:
docs/pictures/observability.png.

Usage: python -m tools.draw_panels MODEL [--slots N]

A real Prometheus scrapes the server, while more and more clients ask it, and answers
the panels' queries. So no two runs draw the same. Needs Prometheus and Matplotlib.
"""

import argparse
import io
import math
import random
import shlex
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from tests.support import ROOT
from tests.support.prometheus import (
    BINARY,
    WINDOW_S,
    Panel,
    Series,
    panels,
    scraping,
)
from tests.support.server import Server, serving

matplotlib.use("Agg")

PICTURE = ROOT / "docs" / "pictures" / "observability.png"
CLIENTS = (1, 4, 8)
"""At a time, a third of the time each."""

PAGES = ("README.md", "LICENSE", "docs/tour.md", "docs/limits.md", "docs/sizing.md")
"""Prompts are pieces of these."""

COLUMNS = 3
COLOURS = ("#3274d9", "#e0752d", "#56a64b", "#8f3bb8")
TEXT, QUIET, GRID = "#24292e", "#6a737d", "#e1e4e8"


def ask_for(server: Server, seconds: float, clients: int, seed: int) -> None:
    """Keeps so many requests running, of pieces of the pages."""
    text = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    end = time.monotonic() + seconds

    def client(number: int) -> None:
        drawn, asking = random.Random(f"{seed} {number}"), server.client()
        while time.monotonic() < end:
            begin = drawn.randrange(len(text) - 200)
            asking.completions.create(
                model="sample",
                prompt=text[begin : begin + drawn.randrange(20, 200)],
                max_tokens=drawn.randrange(32, 192),
                temperature=1,
                seed=drawn.randrange(1 << 30),
                extra_body={"ignore_eos": True},
            )

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))


def observe(
    model: Path, slots: str, seconds: float, arguments: list[str]
) -> dict[Panel, Series]:
    """What every panel shows of a server of `model` while it is asked."""
    with tempfile.TemporaryDirectory() as work:
        common = ("--max-model-len", "512", "--moe-gpu-prefetch", slots)
        with serving(model, Path(work) / "log", *common, *arguments) as server:
            ask_for(server, 1, 1, seed=-1)  # warms up
            with scraping(server, Path(work) / "prometheus") as prometheus:
                begin = time.time()
                for seed, clients in enumerate(CLIENTS):
                    ask_for(server, seconds / len(CLIENTS), clients, seed)
                end = time.time()
                return {
                    panel: prometheus.series(panel, begin + WINDOW_S, end)
                    for panel in panels()
                }


def _unit(unit: str, highest: float) -> tuple[float, str]:
    """What values of a unit of Grafana's are multiplied by, and the unit that they then
    have, if so much is the highest."""
    if unit == "percentunit":
        return 100, "%"
    if unit in ("bytes", "Bps"):
        step, names = (1024, "KiB MiB GiB") if unit == "bytes" else (1000, "kB MB GB")
        power = next((p for p in (3, 2) if highest >= step**p), 1)
        name = names.split()[power - 1] + ("/s" if unit == "Bps" else "")
        return step**-power, f" {name}"
    return 1, ""


def _lines(axes: Axes, panel: Panel, series: Series, begin: float) -> None:
    highest = max(value for points in series.values() for _, value in points)
    factor, unit = _unit(panel.unit, highest)
    for colour, (name, points) in zip(COLOURS * 9, series.items(), strict=False):
        at = [moment - begin for moment, _ in points]
        values = [value * factor for _, value in points]
        axes.plot(at, values, color=colour, linewidth=1.6, label=name)
        axes.fill_between(at, values, color=colour, alpha=0.08, linewidth=0)
    axes.set_ylim(0, highest * factor * 1.15 or 1)
    if panel.unit == "percentunit" and highest > 0.5:
        axes.set_ylim(0, factor)
    axes.yaxis.set_major_formatter(f"{{x:g}}{unit}")
    axes.grid(color=GRID, linewidth=0.8)
    if len(series) > 1:
        axes.legend(loc="best", fontsize=7, frameon=False, labelcolor=QUIET)


def _heat(axes: Axes, panel: Panel, series: Series, begin: float) -> None:
    """A row for each layer, from the first to the last, over time."""
    numbers = {
        name: int(next(p for p in name.split(".") if p.isdigit())) for name in series
    }
    rows = sorted(series, key=lambda name: numbers[name])
    times = sorted({at for points in series.values() for at, _ in points})
    factor, unit = _unit(panel.unit, 1)
    points = [dict(series[name]) for name in rows]
    grid = [[row.get(at, math.nan) * factor for at in times] for row in points]
    extent = (times[0] - begin, times[-1] - begin + 1, len(rows) - 0.5, -0.5)
    image = axes.imshow(
        grid, aspect="auto", extent=extent, vmin=0, vmax=factor, cmap="RdYlGn"
    )
    axes.set_ylabel("layer", fontsize=7, color=QUIET)
    axes.set_yticks(range(0, len(rows), max(1, len(rows) // 8)))
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02)
    bar.ax.yaxis.set_major_formatter(f"{{x:g}}{unit}")
    bar.ax.tick_params(labelsize=7, colors=QUIET, length=0)
    bar.outline.set_visible(False)


def draw(shown: dict[Panel, Series], path: Path) -> None:
    """Draws what `observe` gives."""
    times = [
        at
        for series in shown.values()
        for points in series.values()
        for at, _ in points
    ]
    begin, end = min(times), max(times)
    rows = -(-len(shown) // COLUMNS)
    figure = Figure(figsize=(12, 2.3 * rows), dpi=90, layout="constrained")
    for number, (panel, series) in enumerate(shown.items(), start=1):
        axes = figure.add_subplot(rows, COLUMNS, number)
        axes.set_title(panel.title, fontsize=9, loc="left", color=TEXT, weight="bold")
        axes.tick_params(labelsize=7, colors=QUIET, length=0)
        for spine in axes.spines.values():
            spine.set_color(GRID)
        if series:
            plot = _heat if panel.kind == "table" else _lines
            plot(axes, panel, series, begin)
            axes.set_xlim(0, max(1, end - begin))
        else:
            axes.set_xticks([])
            axes.set_yticks([])
            where = {"ha": "center", "va": "center", "transform": axes.transAxes}
            axes.text(
                0.5, 0.5, "no data from this server", color=QUIET, fontsize=8, **where
            )
        axes.xaxis.set_major_formatter("{x:g} s")
    drawn = io.BytesIO()
    figure.savefig(drawn, metadata={"Software": None})
    with Image.open(drawn) as image:  # fewer colours: a fraction of the bytes
        image.convert("RGB").quantize(256).save(path, optimize=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="its directory")
    parser.add_argument("--slots", default="8", metavar="N|SIZE|auto")
    parser.add_argument("--seconds", type=float, default=75.0)
    parser.add_argument("--output", type=Path, default=PICTURE)
    parser.add_argument("--flags", default="", help="more of vllm serve, as one text")
    given = parser.parse_args()
    more = shlex.split(given.flags)
    if BINARY is None:
        print("Prometheus is not installed (apt-get install prometheus).")
        return 1
    draw(observe(given.model, given.slots, given.seconds, more), given.output)
    print(f"{given.output}: {given.output.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
