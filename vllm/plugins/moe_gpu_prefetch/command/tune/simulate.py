# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a recorded layer would have loaded with other slots or another policy."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple, cast

import numpy as np

from vllm.model_executor.layers.fused_moe.expert_slots.config import clamp
from vllm.model_executor.layers.fused_moe.expert_slots.counters import TOTALS
from vllm.model_executor.layers.fused_moe.expert_slots.decisions.policy import (
    ExpertHistory,
)
from vllm.model_executor.layers.fused_moe.expert_slots.decisions.step import (
    first_tables,
)
from vllm.model_executor.layers.fused_moe.expert_slots.trace.reading import LayerTrace
from vllm.plugins.moe_gpu_prefetch.command.tune import kernels

POLICIES = ("lru", "lfu", "belady")
"""The engine's policies, and the fewest loads that its rules allow."""


class Point(NamedTuple):
    """What a simulation is asked."""

    slots: int
    policy: str


class SimulatedLayer:
    """A layer's steps in the form that the loops take.

    Args:
        layer: of a trace.
        kinds: [n] int8, `DECODE` or `PREFILL` for each step (`steps.py`).
    """

    def __init__(self, layer: LayerTrace, kinds: np.ndarray):
        self.layer, self.kinds = layer, kinds
        # Of one type each, and writable: the loops are compiled for each type.
        self._experts = np.require(layer.experts, np.int16, ("C", "W"))
        self._offsets = np.require(layer.offsets, np.int64, ("C", "W"))
        self._numbers = np.require(layer.steps, np.int64, ("C", "W"))
        self._later = np.empty(len(self._experts), np.int32)
        self._first = np.empty(layer.num_experts, np.int32)

    def look_ahead(self) -> None:
        """Finds the next need of every expert. To be called before `run`."""
        kernels.later_needs(self._experts, self._offsets, self._later, self._first)

    def run(self, point: Point) -> np.ndarray:
        """What the steps do: [2, len(kernels.COUNTED)] int64, a row for each kind. The
        slots begin as they did when the layer was recorded."""
        layer = self.layer
        slots = clamp(point.slots, layer.top_k, layer.num_experts)
        named = "lru" if point.policy == "belady" else point.policy
        history = ExpertHistory(
            layer.num_experts, cast(Literal["lru", "lfu"], named), layer.lfu_half_life
        )
        tables = first_tables(history, slots, layer.start)
        counts: np.ndarray = np.zeros((2, len(kernels.COUNTED)), np.int64)
        kernels.run_policy(
            *(self._experts, self._offsets, self._numbers, self.kinds),
            *(self._later, self._first),
            *(POLICIES.index(point.policy), layer.lfu_half_life),
            *(tables.slot_to_expert, history.last_needed, history.frequency),
            counts,
        )
        return counts

    def reuse(self) -> np.ndarray:
        """The needs at each reuse distance, [E] int64."""
        counts: np.ndarray = np.zeros(self.layer.num_experts, np.int64)
        kernels.reuse_distances(self._experts, self._offsets, counts)
        return counts


def simulate(layers: Sequence[SimulatedLayer], points: Sequence[Point]) -> np.ndarray:
    """Runs every layer at every point, on all cores.

    Returns:
        [layers, points, 2, len(kernels.COUNTED)] int64.
    """
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        list(threads.map(SimulatedLayer.look_ahead, layers))
        runs = [(layer, point) for layer in layers for point in points]
        counts = list(threads.map(lambda run: run[0].run(run[1]), runs))
    shape = (len(layers), len(points), 2, len(kernels.COUNTED))
    return np.array(counts, np.int64).reshape(shape)


def totals(counts: np.ndarray, bytes_per_expert: int) -> dict[str, int]:
    """The engine's totals.

    Args:
        counts: [..., len(kernels.COUNTED)] int64, added up.
        bytes_per_expert: of the layer.
    """
    sums = counts.reshape(-1, len(kernels.COUNTED)).sum(axis=0).tolist()
    counted = dict(zip(kernels.COUNTED, sums, strict=True))
    loads = counted["needed"] - counted["hits"]
    counted |= {
        "misses": loads,
        "loads": loads,
        "evictions": loads - counted["staged"],
        "bytes_loaded": loads * bytes_per_expert,
    }
    return {name: counted[name] for name in TOTALS}
