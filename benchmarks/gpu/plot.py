# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The plot of the step `speed`: decode as a ratio to stock, by the number of slots."""

from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.results import Row

RATIO = "of stock"
_STYLE = {"svg.fonttype": "none", "svg.hashsalt": "gpu-proof", "axes.grid": True}


def draw(rows: list[Row], file: Path) -> None:
    """Draws the rows of `speed_rows`: a panel for each routing, a line for each batch,
    and stock's offloads across it, dashed. Nothing where nothing decodes."""
    decodes = [row for row in rows if str(row.get("what")).startswith("decode")]
    decodes = [row for row in decodes if RATIO in row]
    routings = list(dict.fromkeys(row["routing"] for row in decodes))
    if not routings:
        return
    with rc_context(_STYLE):
        figure = Figure((5 * len(routings), 4.2), layout="constrained")
        panels = figure.subplots(1, len(routings), sharey=True, squeeze=False)[0]
        for panel, routing in zip(panels, routings, strict=True):
            _draw(panel, [row for row in decodes if row["routing"] == routing])
            panel.set_title(routing)
            panel.set_xlabel("expert slots of a layer, N")
        panels[0].set_ylabel("tokens/s, as a ratio to stock with all experts resident")
        figure.savefig(file, metadata={"Date": None})


def _draw(panel: Axes, rows: list[Row]) -> None:
    batches = list(dict.fromkeys(row["what"] for row in rows))
    for number, batch in enumerate(batches):
        of_batch = [row for row in rows if row["what"] == batch]
        points = sorted(
            (int(row["engine"].removeprefix("N = ")), row[RATIO])
            for row in of_batch
            if row["engine"].removeprefix("N = ").isdecimal()
        )
        colour = f"C{number}"
        name = batch.removeprefix("decode, ")
        slots, ratios = [n for n, _ in points], [ratio for _, ratio in points]
        panel.plot(slots, ratios, "o-", color=colour, label=name)
        for row in of_batch:
            if "UVA" in row["engine"] or "prefetch" in row["engine"]:
                label = f"{row['engine']}, {name}"
                panel.axhline(row[RATIO], color=colour, ls="--", lw=0.8, label=label)
    panel.set_ylim(bottom=0)
    panel.legend(fontsize=7, frameon=False)
