# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The plots of `vllm-moe-prefetch tune`. The same answer gives the same bytes, with one
version of matplotlib."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError
from vllm.plugins.moe_gpu_prefetch.command.tune.report import Answer
from vllm.plugins.moe_gpu_prefetch.command.tune.simulate import POLICIES, Point

try:
    from matplotlib import rc_context
    from matplotlib.figure import Figure
except ImportError:
    raise MoEPrefetchError(
        "--plots needs matplotlib. Install vllm-moe-gpu-prefetch[plots], or leave "
        "--plots out."
    ) from None

_INK, _GREY, _LINE = "#1f2328", "#59636e", "#d1d9e0"
_COLOURS = {"lru": "#2f6fd6", "lfu": "#e08a1e", "belady": "#8c959f"}
_NAMES = {"lru": "lru", "lfu": "lfu", "belady": "Belady (knows the future)"}
_STYLE: Any = {
    "axes.edgecolor": _LINE,
    "axes.grid": True,
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 11,
    "grid.color": _LINE,
    "legend.frameon": False,
    "lines.linewidth": 2.2,
    "savefig.facecolor": "white",
    "svg.fonttype": "none",
    "svg.hashsalt": "vllm-moe-prefetch",
    "text.color": _INK,
    "xtick.color": _GREY,
    "ytick.color": _GREY,
}
_SIZE, _DPI = (7.6, 4.4), 120
_LABELLED_LAYERS = 24
"""Layers up to which the heat map names each."""


def draw(answer: Answer, directory: Path, form: str) -> list[Path]:
    """Draws all plots.

    Args:
        answer: what they show.
        directory: where they go; made if it is missing.
        form: "svg" or "png".

    Returns:
        Their files.

    Raises:
        MoEPrefetchError: the directory cannot be written.
    """
    files = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, plot in _plots(answer):
            files.append(directory / f"{name}.{form}")
            with rc_context(_STYLE):
                figure = Figure(_SIZE, layout="constrained")
                plot(answer, figure, figure.subplots())
                metadata = {"Date": None} if form == "svg" else None
                figure.savefig(files[-1], dpi=_DPI, metadata=metadata)
    except OSError as error:
        raise MoEPrefetchError(
            f"--plots {directory}: {error.strerror}. Name a directory of your own."
        ) from None
    return files


def _plots(answer: Answer) -> Iterator[tuple[str, Callable[[Answer, Any, Any], None]]]:
    yield "hit-rate", _hit_rate
    yield "layers", _layers
    yield "reuse-distance", _reuse_distance
    if answer.speed is not None:
        yield "speed", _speed


def _marks(answer: Answer, axes: Any) -> None:
    """What was recorded and what is recommended, as vertical lines."""
    recorded, advised = answer.study.recorded, answer.advice.slots
    for slots in recorded:
        axes.axvline(slots, color=_GREY, linewidth=1.2, linestyle=":")
    axes.axvline(advised, color=_INK, linewidth=1.2, linestyle="--")
    axes.plot([], [], color=_GREY, linewidth=1.2, linestyle=":", label="recorded")
    axes.plot([], [], color=_INK, linewidth=1.2, linestyle="--", label="recommended")


def _legend(figure: Any) -> None:
    figure.legend(loc="outside lower center", ncols=5, columnspacing=1.2)


def _of_experts(answer: Answer, axes: Any) -> None:
    """The x axis from 0 to E, by eighths."""
    experts = answer.study.num_experts
    axes.set_xlim(0, experts)
    axes.set_xticks([experts * part / 8 for part in range(9)])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _hit_rate(answer: Answer, figure: Any, axes: Any) -> None:
    study = answer.study
    for policy in POLICIES:
        rates = [study.figures[Point(n, policy)].hit_rate * 100 for n in answer.rows]
        axes.plot(
            answer.rows, rates, color=_COLOURS[policy], label=_NAMES[policy],
            marker="o", markersize=4, clip_on=False,
        )  # fmt: skip
    _marks(answer, axes)
    _of_experts(answer, axes)
    axes.set_ylim(0, 100)
    axes.yaxis.set_major_formatter("{x:g} %")
    axes.set_xlabel("slots of each layer")
    axes.set_title("Hit rate")
    _legend(figure)


def _layers(answer: Answer, figure: Any, axes: Any) -> None:
    study, advice = answer.study, answer.advice
    rates = [
        study.figures[Point(slots, advice.policy)].hit_rates for slots in answer.rows
    ]
    height = max(_SIZE[1], 0.16 * len(study.layers) + 1.4)
    figure.set_size_inches(_SIZE[0], height)
    image = axes.imshow(
        np.array(rates).T * 100, aspect="auto", vmin=0, vmax=100, cmap="viridis",
        interpolation="nearest",
    )  # fmt: skip
    axes.grid(False)
    axes.set_xticks(range(len(answer.rows)), map(str, answer.rows))
    step = -(-len(study.layers) // _LABELLED_LAYERS)
    axes.set_yticks(range(0, len(study.layers), step))
    axes.set_xlabel("slots of each layer")
    axes.set_ylabel("MoE layer")
    axes.set_title(f"Hit rate of each layer, {advice.policy}")
    bar = figure.colorbar(image, ax=axes, format="{x:g} %")
    bar.outline.set_visible(False)


def _reuse_distance(answer: Answer, figure: Any, axes: Any) -> None:
    counts = answer.study.reuse

    def shares(of: np.ndarray) -> np.ndarray:
        sums = np.cumsum(of, axis=-1)
        return sums / np.maximum(1, sums[..., -1:]) * 100

    distances, layers = range(counts.shape[1]), shares(counts)
    axes.fill_between(
        distances, layers.min(axis=0), layers.max(axis=0), step="post", color=_LINE,
        linewidth=0, label="from the lowest layer to the highest",
    )  # fmt: skip
    axes.plot(
        distances, shares(counts.sum(axis=0)), drawstyle="steps-post",
        color=_COLOURS["lru"], label="all layers",
    )  # fmt: skip
    _of_experts(answer, axes)
    axes.set_ylim(0, 100)
    axes.yaxis.set_major_formatter("{x:g} %")
    axes.set_xlabel("distinct experts between two needs of an expert")
    axes.set_ylabel("needs with at most so many")
    axes.set_title("Reuse distance")
    _legend(figure)


def _speed(answer: Answer, figure: Any, axes: Any) -> None:
    assert answer.speed is not None
    for policy in POLICIES:
        found = [answer.row(n, policy)["tokens_per_second"] for n in answer.rows]
        axes.plot(
            answer.rows, [np.nan if each is None else each for each in found],
            color=_COLOURS[policy], label=_NAMES[policy], marker="o", markersize=4,
            clip_on=False,
        )  # fmt: skip
    _marks(answer, axes)
    _of_experts(answer, axes)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("slots of each layer")
    axes.set_ylabel("tokens/s")
    link = answer.speed.link / 1e9
    axes.set_title(
        f"Predicted: {link:,.1f} GB/s, {answer.speed.step_time * 1e3:,.2f} ms a step "
        "without loads"
    )
    _legend(figure)
