# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Reads a trace file."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError
from vllm.model_executor.layers.fused_moe.expert_slots.counters import TOTALS
from vllm.model_executor.layers.fused_moe.expert_slots.decisions.policy import Ranking
from vllm.model_executor.layers.fused_moe.expert_slots.trace import format


@dataclass(frozen=True)
class LayerTrace:
    """The steps of one layer.

    Attributes:
        name: of the layer.
        num_experts: E of this rank.
        num_slots: N of the run that was recorded.
        top_k: of the router.
        routed: experts of this rank that a token is expected to need; `top_k` without
            expert parallelism.
        bytes_per_expert: that a load moves.
        policy: of the run.
        lfu_half_life: of the run.
        start: what the slots began with; None: experts 0 ... N-1 without a history.
        steps: [n] int64, the number of each step, from 1, ascending. A step of padding
            alone is none.
        rows: [n] int64, the pairs of a token and an expert of this rank in each step.
        offsets: [n + 1] int64. The needed experts of step i are
            `experts[offsets[i] : offsets[i + 1]]`.
        experts: [needed] int16, ascending within a step.
        totals: the engine's counters (`counters.TOTALS`) after the last of these
            steps; None if the file does not say.
        lost: steps that are missing between the first and the last.
    """

    name: str
    num_experts: int
    num_slots: int
    top_k: int
    routed: float
    bytes_per_expert: int
    policy: str
    lfu_half_life: int
    start: Ranking | None
    steps: np.ndarray
    rows: np.ndarray
    offsets: np.ndarray
    experts: np.ndarray
    totals: dict[str, int] | None

    @property
    def lost(self) -> int:
        return int(self.steps[-1]) - len(self.steps) if len(self.steps) else 0


@dataclass(frozen=True)
class Trace:
    """What a worker recorded.

    Attributes:
        path: of the file.
        model: its name.
        rank: of the worker.
        platform: "cuda" or "cpu".
        vllm: its version.
        max_num_seqs: of the engine.
        link: bytes a second from host to device, if the engine measured it.
        kv_bytes_per_token: bytes of KV cache that a token takes on this rank, if known.
        busy_seconds: in which the engine made these steps.
        ended: "closed"; "limit", where the file reached its largest size; or
            "interrupted".
        layers: in the order of the model.
    """

    path: Path
    model: str
    rank: int
    platform: str
    vllm: str
    max_num_seqs: int
    link: float | None
    kv_bytes_per_token: float | None
    busy_seconds: float
    ended: str
    layers: list[LayerTrace]

    @property
    def complete(self) -> bool:
        """Whether the recording ended with the engine."""
        return self.ended == "closed"

    @classmethod
    def read(cls, path: Path) -> "Trace":
        """Reads a file, also while it is written or after its engine was killed.

        Raises:
            MoEPrefetchError: there is no such file, it is no trace, or it is damaged.
        """
        try:
            if path.exists() and not path.is_file():
                raise MoEPrefetchError(f"{path}: not a regular file.")
            data = path.read_bytes()
        except OSError as error:
            raise MoEPrefetchError(f"{path}: {error.strerror}.") from None
        if not data.startswith(format.MAGIC):
            raise MoEPrefetchError(
                f"{path}: not a trace of this version. Record one with "
                "--moe-gpu-prefetch-config.trace."
            )
        try:
            return _parsed(path, memoryview(data)[len(format.MAGIC) :])
        except ValueError as error:
            first = (
                error.errors()[0]["msg"]
                if isinstance(error, ValidationError)
                else str(error)
            )
            raise MoEPrefetchError(f"{path}: {first}. Record it again.") from None


class _Part:
    """Consecutive steps of a layer."""

    def __init__(self, first: int, rows: np.ndarray, needed: np.ndarray):
        self.steps = np.arange(first, first + len(rows), dtype=np.int64)
        self.rows = rows
        self.counts = np.count_nonzero(needed, axis=1)
        self.experts = needed.nonzero()[1].astype(np.int16)


def _parsed(path: Path, data: memoryview) -> Trace:
    """
    Raises:
        ValueError: the file is damaged.
    """
    header: format.Header | None = None
    state, ended = format.State(busy_seconds=0, totals={}), "interrupted"
    parts: list[list[_Part]] = []
    for kind, layer, count, first, content in format.frames(data):
        if header is None:
            if kind != format.HEADER:
                raise ValueError("it has no header")
            header = format.Header.model_validate_json(content)
            parts = [[] for _ in header.layers]
        elif kind == format.STEPS:
            if layer >= len(parts):
                raise ValueError(f"it has steps of a layer {layer}")
            before = parts[layer][-1].steps[-1] if parts[layer] else 0
            if not before < first < 1 << 62:
                raise ValueError(f"step {first} of layer {layer} follows {before}")
            experts = header.layers[layer].num_experts
            rows, needed = format.unpack_steps(content, count, experts)
            parts[layer].append(_Part(first, rows, needed))
        elif kind == format.STATE:
            state = format.State.model_validate_json(format.unpack(content))
            if any(set(totals) != set(TOTALS) for totals in state.totals.values()):
                raise ValueError("its counters are those of another version")
        elif kind == format.END:
            ended = format.End.model_validate_json(content).reason
    if header is None:
        raise ValueError("it ends before its header")
    layers = [
        _layer(constants, part, state.totals.get(constants.name))
        for constants, part in zip(header.layers, parts, strict=True)
    ]
    return Trace(
        path,
        busy_seconds=state.busy_seconds,
        ended=ended,
        layers=layers,
        **header.model_dump(exclude={"layers"}),
    )


def _layer(
    constants: format.LayerHeader,
    parts: list[_Part],
    totals: dict[str, int] | None,
) -> LayerTrace:
    none: np.ndarray = np.empty(0, np.int64)
    steps = np.concatenate([none, *(part.steps for part in parts)])
    rows = np.concatenate([none, *(part.rows for part in parts)])
    counts = np.concatenate([none, *(part.counts for part in parts)])
    experts = np.concatenate([none.astype(np.int16), *(part.experts for part in parts)])
    offsets = np.concatenate(([0], np.cumsum(counts)))
    if totals is not None and totals["steps"] != (steps[-1] if len(steps) else 0):
        totals = None  # of an earlier moment
    start = None
    if constants.experts is not None:
        start = Ranking(constants.experts, constants.counts or [])
    return LayerTrace(
        start=start,
        steps=steps,
        rows=rows,
        offsets=offsets.astype(np.int64),
        experts=experts,
        totals=totals,
        **constants.model_dump(exclude={"experts", "counts"}),
    )
