# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Traces that were not recorded: the needed sets are given, the counters are those of
the engine's own code."""

import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vllm.model_executor.layers.fused_moe.expert_slots.counters import (
    TOTALS,
    SlotCounters,
)
from vllm.model_executor.layers.fused_moe.expert_slots.decisions.policy import (
    ExpertHistory,
)
from vllm.model_executor.layers.fused_moe.expert_slots.decisions.step import (
    first_tables,
    plan_step,
)
from vllm.model_executor.layers.fused_moe.expert_slots.trace import format
from vllm.model_executor.layers.fused_moe.expert_slots.trace.reading import (
    LayerTrace,
    Trace,
)


def layer_of(
    sets: Sequence[Sequence[int]],
    num_experts: int,
    num_slots: int,
    tokens: Sequence[int] | None = None,
    **others: Any,
) -> LayerTrace:
    """A layer that needed these sets, with its counters.

    Args:
        tokens: of each step; one in each if not given.
        others: attributes of the layer: by default top-1, lru and 1,000 bytes an
            expert.
    """
    needed = np.zeros((len(sets), num_experts), np.bool_)
    for step, each in enumerate(sets):
        needed[step, list(each)] = True
    tokens = [1] * len(sets) if tokens is None else tokens
    layer = _layer(needed, tokens, num_slots=num_slots, **others)
    return replace(layer, totals=counted(layer, num_slots, layer.policy))


def layer_of_ids(ids: np.ndarray, num_experts: int, **others: Any) -> LayerTrace:
    """A layer that needed these experts, without counters.

    Args:
        ids: [steps, tokens * top_k] integers.
        others: as in `layer_of`, `top_k` and `num_slots` among them.
    """
    needed = np.zeros((len(ids), num_experts), np.bool_)
    np.put_along_axis(needed, ids, True, axis=1)
    tokens = [ids.shape[1] // others["top_k"]] * len(ids)
    return _layer(needed, tokens, **others)


def _layer(needed: np.ndarray, tokens: Sequence[int], **others: Any) -> LayerTrace:
    layer = LayerTrace(
        num_experts=needed.shape[1],
        steps=np.arange(1, len(needed) + 1),
        rows=np.zeros(0, np.int64),
        offsets=np.concatenate(([0], np.cumsum(needed.sum(axis=1)))),
        experts=needed.nonzero()[1].astype(np.int16),
        totals=None,
        **{
            "name": "model.layers.0.mlp.experts", "top_k": 1, "bytes_per_expert": 1000,
            "policy": "lru", "lfu_half_life": 8, "start": None, "routed": 1.0,
        } | others,
    )  # fmt: skip
    rows = np.array(tokens, np.int64) * layer.routed
    return replace(layer, rows=rows.astype(np.int64))


def counted(layer: LayerTrace, num_slots: int, policy: Any) -> dict[str, int]:
    """What the engine counts for the layer's steps with other slots or policy."""
    history = ExpertHistory(layer.num_experts, policy, layer.lfu_half_life)
    tables = first_tables(history, num_slots, layer.start)
    counters = SlotCounters("", 0, num_slots, layer.bytes_per_expert, layer.num_experts)
    for begin, end in zip(layer.offsets, layer.offsets[1:], strict=False):
        counters.add(plan_step(tables, history, layer.experts[begin:end]))
    values = counters.as_dict()
    return {name: values[name] for name in TOTALS}


def check_counters(trace: Trace) -> None:
    """Nothing is missing, and the decisions on these needs give what the engine
    counted."""
    for layer in trace.layers:
        assert layer.lost == 0 and layer.totals
        assert layer.totals == counted(layer, layer.num_slots, layer.policy)
        assert layer.totals["needed"] == len(layer.experts) > layer.totals["hits"] > 0


def write_trace(path: Path, layers: Sequence[LayerTrace], **header: Any) -> Path:
    """Writes layers as a recorder would; `header`: what differs from a default one, and
    `busy_seconds`."""
    busy_seconds = header.pop("busy_seconds", 1.0)
    first = format.Header(
        **{
            "model": "some-model", "rank": 0, "platform": "cuda", "vllm": "0.32.0",
            "max_num_seqs": 4, "link": None, "kv_bytes_per_token": None,
            "layers": [
                format.LayerHeader(
                    experts=None if each.start is None else each.start.experts,
                    counts=None if each.start is None else each.start.counts,
                    **{
                        name: getattr(each, name)
                        for name in format.LayerHeader.model_fields
                        if name not in ("experts", "counts")
                    },
                )
                for each in layers
            ],
        } | header
    )  # fmt: skip
    frames = [format.frame(format.HEADER, first.model_dump_json().encode())]
    for number, each in enumerate(layers):
        frames += _steps(number, each)
    totals = {each.name: each.totals for each in layers if each.totals is not None}
    state = format.State(busy_seconds=busy_seconds, totals=totals)
    content = zlib.compress(state.model_dump_json().encode())
    frames.append(format.frame(format.STATE, content))
    end = format.End(reason="closed").model_dump_json().encode()
    path.write_bytes(b"".join([format.MAGIC, *frames, format.frame(format.END, end)]))
    return path


def _steps(number: int, layer: LayerTrace) -> list[bytes]:
    """A frame for each run of steps without a gap."""
    needed: np.ndarray = np.zeros((len(layer.steps), layer.num_experts), np.uint8)
    steps = np.arange(len(layer.steps)).repeat(np.diff(layer.offsets))
    needed[steps, layer.experts] = 1
    sets = np.packbits(needed, axis=1, bitorder="little")
    gaps = (np.diff(layer.steps) > 1).nonzero()[0] + 1
    return [
        format.frame(
            format.STEPS,
            format.pack_steps(layer.rows[run], sets[run]),
            number,
            len(run),
            int(layer.steps[run[0]]),
        )
        for run in np.split(np.arange(len(layer.steps)), gaps)
        if len(run)
    ]
