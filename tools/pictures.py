# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Draws the pictures of the documentation: docs/pictures/{memory,hit-rate,step}.svg.

Usage: python -m tools.pictures

The figures are the code's own: the memory is what `vllm-moe-prefetch plan` answers, the
hit rates and the step are what the decisions of the CPU platform give. Half a minute,
no GPU, no weights. The same versions draw the same bytes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.routing.odds import STRATEGIES, stream
from tools.sizing_table import OPTIONS, write
from tools.svg import BLUE, CARD, EDGE, GREEN, GREY, ORANGE, QUIET, RED, WIDTH, Canvas
from vllm.model_executor.layers.fused_moe.expert_slots.decisions.policy import (
    ExpertHistory,
)
from vllm.model_executor.layers.fused_moe.expert_slots.decisions.step import (
    ResidencyTables,
    plan_step,
)

PICTURES = Path(__file__).resolve().parents[1] / "docs" / "pictures"

MODEL, GPU = "Qwen3-30B-A3B", "RTX 4090"
EXPERTS, TOP_K = 128, 8
"""Of `MODEL`."""

PLANNED = f"8,16,24,32,38,{EXPERTS}"
PUBLISHED = {8: 42.4, 16: 64.7, 32: 81.0, 64: 91.8}
"""Hit rate of LRU in percent by N, of `MODEL` over 3,225 decoded tokens, each prompt
with an empty cache: github.com/gajsanders/moe-trace, docs/findings/007."""

_LEFT = 66.0
"""Where the two charts begin."""

_MIDDLE = {"text_anchor": "middle"}
_BOLD = {"font_weight": "bold"}
_SMALL = {"fill": QUIET}


def _gib(num_bytes: int) -> float:
    return num_bytes / (1 << 30)


@cache
def plans(slots: str = PLANNED, *options: str) -> list[dict[str, Any]]:
    """What `vllm-moe-prefetch plan` answers of `MODEL` on `GPU` with `options`, one
    plan for each of `slots`."""
    with tempfile.TemporaryDirectory() as place:
        model = write(MODEL, Path(place))
        command = Path(sys.executable).with_name("vllm-moe-prefetch")
        asked = [str(command), "plan", str(model), "--gpu", GPU, "--json", *OPTIONS]
        asked += ["--slots", slots, *options]
        result = subprocess.run(asked, capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stderr)
    return json.loads(result.stdout)


def memory() -> str:
    """Stacked bars: what the GPU's memory holds, by N."""
    canvas = Canvas(424, f"GPU memory of {MODEL} (bfloat16) in GiB, by slots a layer")
    parts = (
        ("other weights", GREY, "other_weight_bytes", 24),
        ("slots", BLUE, "slot_bytes", 142),
        ("staging", ORANGE, "staging_bytes", 216),
        ("overheads (estimate)", EDGE, "overhead_bytes", 302),
        ("left for the KV cache", GREEN, "kv_cache_bytes", 466),
    )
    for name, colour, _, x in parts:
        canvas.key(x, 52, colour, name)
    base, scale = 354, 4.4  # pixels; pixels a GiB
    for tick in range(0, 61, 10):
        y = base - tick * scale
        canvas.line(_LEFT, y, WIDTH - 24, y)
        canvas.text(58, y + 4, f"{tick}", 12, text_anchor="end", **_SMALL)
    answers = plans()
    for index, plan in enumerate(answers):
        x, y = _LEFT + 26 + index * 110, float(base)
        for _, colour, field, _ in parts:
            height = _gib(plan[field]) * scale
            y -= height
            canvas.box(x, y, 62, height, fill=colour)
        taken, left = _gib(plan["gpu_bytes"]), _gib(plan["kv_cache_bytes"])
        label = f"N = {plan['slots']}" if plan["slots"] < EXPERTS else "all experts"
        note = (
            f"{taken:.1f} + {left:.1f}"
            if plan["fits"]
            else f"{taken:.1f}, does not fit"
        )
        canvas.text(x + 31, base + 19, label, **_MIDDLE, **_BOLD)
        canvas.text(x + 31, base + 35, note, 11, **_MIDDLE, **_SMALL)
    limit = _gib(answers[0]["gpu_bytes"] + answers[0]["kv_cache_bytes"])
    y = base - limit * scale
    canvas.line(_LEFT, y, WIDTH - 24, y, stroke=RED, stroke_dasharray="6 4")
    words = f"what vLLM may use of an {GPU}: {limit:.2f} GiB"
    canvas.text(_LEFT + 6, y - 7, words, 12, fill=RED)
    host = _gib(answers[0]["host_bytes"])
    words = f"Host memory takes {host:.0f} GiB of experts, for every N below {EXPERTS}."
    canvas.text(_LEFT, base + 58, words, 12, **_SMALL)
    return canvas.svg()


def hit_rates() -> str:
    """Lines: the hit rate by N, simulated. Rings: published rates of a real model."""
    # They import numba's compiler, which other pictures do not need.
    from benchmarks.policies.replay import Needs, Rule
    from benchmarks.routing.published import rate

    title = f"Hit rate by slots per MoE layer, N, of {EXPERTS} experts, top-{TOP_K}"
    canvas = Canvas(424, title)
    base, width, height = 360, 460, 290

    def place(slots: int, rate: float) -> tuple[float, float]:
        return _LEFT + slots / EXPERTS * width, base - rate * height

    for tick in range(0, 101, 20):
        y = base - tick / 100 * height
        canvas.line(_LEFT, y, _LEFT + width, y)
        canvas.text(58, y + 4, f"{tick}%", 12, text_anchor="end", **_SMALL)
    for slots in range(0, EXPERTS + 1, 16):
        canvas.text(place(slots, 0)[0], base + 20, f"{slots}", 12, **_MIDDLE, **_SMALL)
    lines = (
        ("topics-qwen3", 1, BLUE),
        ("topics-qwen3", 8, ORANGE),
        ("uniform", 1, GREY),
    )
    counts = (8, 12, 16, 24, 32, 48, 64, 80, 96, 112, 127)
    for index, (strategy, batch, colour) in enumerate(lines):
        # In double precision no processor's rounding changes an id.
        ids = stream(
            *(STRATEGIES[strategy], EXPERTS, TOP_K, batch, 8, 128),
            dtype=torch.float64,
        )
        needs = [Needs.of(ids.numpy(), EXPERTS)]
        rates = [rate(needs, slots, Rule("lfu"), False, 100) for slots in counts]
        canvas.curve(map(place, counts, rates), colour)
        y = 120 + index * 26
        canvas.line(546, y, 570, y, stroke=colour, stroke_width=3)
        canvas.text(580, y + 4, f"{strategy}, batch of {batch}", 12)
    for slots, percent in PUBLISHED.items():
        canvas.ring(*place(slots, percent / 100), RED)
    canvas.ring(558, 198, RED)
    canvas.text(580, 202, f"{MODEL},", 12)
    canvas.text(580, 218, "published, lru (moe-trace)", 12)
    words = (
        "Lines: the default policy, simulated on the synthetic routing of benchmarks/."
    )
    canvas.text(_LEFT, 407, words, 12, **_SMALL)
    return canvas.svg()


def step() -> str:
    """One step of a small layer: ids, table, rows, host store."""
    experts, slots, ids = 8, 3, np.array([[1, 4], [6, 7]])
    tables, history = ResidencyTables(experts, slots), ExpertHistory(experts, "lru", 1)
    plan = plan_step(tables, history, ids)
    rows, staging = tables.expert_to_row[:experts].tolist(), experts - slots
    needed, loaded = sorted(ids.ravel().tolist()), plan.load_experts.tolist()
    title = f"One step of a layer: {experts} experts, top-2, {slots} slots, two tokens"
    canvas = Canvas(530, title)
    left, cell = 130, 74
    blue, orange, grey = "#cfe0fb", "#fbe3c3", "#eaeef2"

    def centre(column: int) -> float:
        return left + (column + 0.5) * cell

    def band(y: float, name: str, note: str, cells: Iterable[tuple[str, str]]) -> None:
        canvas.text(24, y + 17, name, **_BOLD)
        canvas.text(24, y + 33, note, 11, **_SMALL)
        for column, (word, fill) in enumerate(cells):
            canvas.box(left + column * cell, y, cell, 40, fill=fill, stroke=QUIET)
            canvas.text(centre(column), y + 27, word, **_MIDDLE, **_BOLD)

    canvas.text(24, 78, "Router", **_BOLD)
    for token, chosen in enumerate(ids.tolist()):
        x = left + (1 + 4 * token) * cell
        canvas.box(x, 56, 2 * cell, 34, fill=grey, stroke=QUIET)
        words = f"token {token}: experts {chosen[0]}, {chosen[1]}"
        canvas.text(x + cell, 78, words, **_MIDDLE)
        for expert in chosen:
            canvas.arrow((x + cell, 90), (centre(expert), 146), QUIET)
    table = [
        (f"{expert} → {row}", grey if expert in needed else CARD)
        for expert, row in enumerate(rows)
    ]
    band(146, "Table", "expert → row", table)
    for expert in needed:
        canvas.arrow((centre(expert), 186), (centre(rows[expert]), 254), QUIET)
    shown = {rows[e]: f"expert {e}" for e in (*tables.slot_to_expert.tolist(), *loaded)}
    memories = [orange] * staging + [blue] * slots
    held = [(shown.get(row, ""), memories[row]) for row in range(experts)]
    band(254, "Rows", "GPU memory", held)
    for row in range(experts):
        canvas.text(left + row * cell + 4, 266, f"{row}", 10, **_SMALL)
    for expert in loaded:
        canvas.arrow((centre(expert), 390), (centre(rows[expert]), 294), RED)
    store = [(f"expert {expert}", CARD) for expert in range(experts)]
    band(390, "Host store", "pinned memory", store)
    canvas.key(24, 448, orange, "staging: one memory that all layers share")
    canvas.key(330, 448, blue, "slots: the layer's own")
    canvas.line(510, 454, 524, 454, stroke=RED, stroke_width=3)
    canvas.text(530, 459, "load", 12)
    (hit,) = sorted(set(needed) - set(loaded))
    *placed, staged = loaded
    words = (
        f"Expert {hit} is a hit. Experts {placed[0]} and {placed[1]} are loaded into "
        f"slots. Expert {staged} finds no slot and is staged for this step alone."
    )
    canvas.text(24, 490, words, 12)
    words = (
        "Stock's kernel runs once, on all rows, with row numbers in the place of ids."
    )
    canvas.text(24, 510, words, 12)
    return canvas.svg()


DRAWN = {"memory.svg": memory, "hit-rate.svg": hit_rates, "step.svg": step}


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    PICTURES.mkdir(exist_ok=True)
    for name, picture in DRAWN.items():
        (PICTURES / name).write_text(picture(), encoding="utf-8")


if __name__ == "__main__":
    main()
