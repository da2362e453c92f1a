# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The traces of one rank, and what they would have loaded with other slots."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from vllm.model_executor.layers.fused_moe.expert_slots.config import (
    MoEPrefetchError,
    clamp,
)
from vllm.model_executor.layers.fused_moe.expert_slots.trace.reading import (
    LayerTrace,
    Trace,
)
from vllm.plugins.moe_gpu_prefetch.command.tune.simulate import (
    Point,
    SimulatedLayer,
    simulate,
    totals,
)
from vllm.plugins.moe_gpu_prefetch.command.tune.steps import Work, kinds_of


@dataclass(frozen=True)
class Figures:
    """What the recorded steps do with one number of slots and one policy, over all
    layers and runs of a rank.

    Attributes:
        totals: the engine's, of all steps.
        needed, hits, loads: of the steps of each kind.
        bytes_loaded: of the steps of each kind.
        hit_rates: [layers] float, of each layer.
    """

    totals: dict[str, int]
    needed: tuple[int, int]
    hits: tuple[int, int]
    loads: tuple[int, int]
    bytes_loaded: tuple[int, int]
    hit_rates: np.ndarray

    @property
    def hit_rate(self) -> float:
        return self.totals["hits"] / self.totals["needed"]

    @property
    def staged_share(self) -> float:
        """Of the loads."""
        return self.totals["staged"] / max(1, self.totals["loads"])

    @property
    def overflow_share(self) -> float:
        """Of the steps."""
        return self.totals["overflow_steps"] / self.totals["steps"]


class Study:
    """The runs of one rank, each simulated from its own start, and added up.

    Args:
        traces: of the same model and rank.

    Attributes:
        layers: constants of each layer that made a step.
        work: what the model did in all runs.
        figures: what was simulated so far.
    """

    def __init__(self, traces: Sequence[Trace]):
        self.traces = traces
        runs = [
            {
                layer.name: SimulatedLayer(layer, kinds_of(layer, trace.max_num_seqs))
                for layer in trace.layers
                if len(layer.steps)
            }
            for trace in traces
        ]
        self.runs = runs
        names = dict.fromkeys(name for run in runs for name in run)
        self._runs_of = {name: [r[name] for r in runs if name in r] for name in names}
        self.layers: list[LayerTrace] = [
            simulated[0].layer for simulated in self._runs_of.values()
        ]
        self.work = Work((0, 0), (0, 0))
        for run in runs:
            self.work += Work.of([(each.layer, each.kinds) for each in run.values()])
        self.figures: dict[Point, Figures] = {}

    @property
    def rank(self) -> int:
        return self.traces[0].rank

    @property
    def num_experts(self) -> int:
        """E of the largest layer."""
        return max(layer.num_experts for layer in self.layers)

    @property
    def top_k(self) -> int:
        """The fewest slots: of the layer that needs most."""
        return max(layer.top_k for layer in self.layers)

    @property
    def recorded(self) -> list[int]:
        """Slots of the runs. A layer with few experts may have had fewer."""
        return sorted({max(s.layer.num_slots for s in r.values()) for r in self.runs})

    @property
    def policy(self) -> str:
        """Of the first run."""
        return self.layers[0].policy

    def slot_bytes(self, slots: int) -> int:
        """What the slots of all layers take."""
        return sum(
            clamp(slots, layer.top_k, layer.num_experts) * layer.bytes_per_expert
            for layer in self.layers
        )

    def staging_bytes(self, slots: int) -> int:
        """What the layers' common staging takes."""
        return max(
            max(0, layer.num_experts - max(slots, layer.top_k)) * layer.bytes_per_expert
            for layer in self.layers
        )

    def run(self, points: Iterable[Point]) -> None:
        """Adds what is missing of `points` to `figures`."""
        new = [point for point in points if point not in self.figures]
        simulated = [each for runs in self._runs_of.values() for each in runs]
        counts = simulate(simulated, new)
        ends = np.cumsum([len(runs) for runs in self._runs_of.values()])[:-1]
        of_layers = [runs.sum(axis=0) for runs in np.split(counts, ends)]
        for at, point in enumerate(new):
            self.figures[point] = self._figures([layer[at] for layer in of_layers])

    def _figures(self, counts: list[np.ndarray]) -> Figures:
        sizes = [layer.bytes_per_expert for layer in self.layers]
        kinds = [
            [
                totals(layer[kind], size)
                for layer, size in zip(counts, sizes, strict=True)
            ]
            for kind in range(2)
        ]
        both = [totals(layer, size) for layer, size in zip(counts, sizes, strict=True)]

        def each_kind(name: str) -> tuple[int, int]:
            decode, prefill = (sum(layer[name] for layer in kind) for kind in kinds)
            return decode, prefill

        return Figures(
            {name: sum(layer[name] for layer in both) for name in both[0]},
            each_kind("needed"),
            each_kind("hits"),
            each_kind("loads"),
            each_kind("bytes_loaded"),
            np.array([layer["hits"] / layer["needed"] for layer in both]),
        )

    @cached_property
    def reuse(self) -> np.ndarray:
        """The needs at each reuse distance, of each layer: [layers, E] int64."""
        counts = np.zeros((len(self.layers), self.num_experts), np.int64)
        for row, runs in zip(counts, self._runs_of.values(), strict=True):
            for each in runs:
                row[: each.layer.num_experts] += each.reuse()
        return counts


def studies(paths: Sequence[Path]) -> list[Study]:
    """One for each rank of the traces.

    Raises:
        MoEPrefetchError: a file cannot be used, or they are not of one model.
    """
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice is not None:
        raise MoEPrefetchError(f"{twice} is named twice. Name each file once.")
    traces = [Trace.read(path) for path in paths]
    for trace in traces:
        if not any(len(layer.steps) for layer in trace.layers):
            raise MoEPrefetchError(
                f"{trace.path}: it has no steps. Send requests to the server while it "
                "records."
            )
    ranks: dict[int, list[Trace]] = {}
    for trace in traces:
        ranks.setdefault(trace.rank, []).append(trace)
        first = ranks[trace.rank][0]
        if trace.model != traces[0].model:
            raise MoEPrefetchError(
                f"{trace.path} is of {trace.model}, and {traces[0].path} of "
                f"{traces[0].model}. Tune one model at a time."
            )
        if _experts_of(trace) != _experts_of(first):
            raise MoEPrefetchError(
                f"{trace.path} and {first.path} have other layers or experts, though "
                f"both are of {trace.model}. Tune one of the two at a time."
            )
        if _policy_of(trace) != _policy_of(traces[0]):
            raise MoEPrefetchError(
                f"{trace.path} was recorded with {_policy_of(trace)}, and "
                f"{traces[0].path} with {_policy_of(traces[0])}. Tune one of the two "
                "at a time."
            )
    made = [Study(of_rank) for of_rank in ranks.values()]
    if not all(any(study.work.steps) for study in made):
        raise MoEPrefetchError("the traces have too few steps. Record some hundred.")
    return made


def _policy_of(trace: Trace) -> str:
    """In words; with the half-life, which the simulation of `lfu` takes."""
    layer = trace.layers[0]
    return f"{layer.policy}, half-life {layer.lfu_half_life}"


def _experts_of(trace: Trace) -> list[tuple[str, int, int, float, int]]:
    return [
        (each.name, each.num_experts, each.top_k, each.routed, each.bytes_per_expert)
        for each in trace.layers
    ]
