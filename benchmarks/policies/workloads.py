# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Needed sets to compare rules on: drawn by calibrated odds, or from a trace."""

from pathlib import Path

import numpy as np
import torch

from benchmarks.policies.replay import Needs
from benchmarks.routing.odds import STRATEGIES, draw, stream
from benchmarks.routing.published import MODELS
from vllm.model_executor.layers.fused_moe.expert_slots.trace.reading import Trace

BATCHES = (1, 8, 32)
LENGTH = 128
"""Tokens that a sequence decodes."""

PROMPT = 1000
"""Tokens of a prefill, which comes in one step with the decode of the other
sequences."""

WIDE = 64
"""A step of more tokens is wide."""


def decoding(name: str, batch: int, steps: int, seed: int) -> Needs:
    """Groups of `batch` sequences in lockstep, one group after another, no prefill."""
    model, groups = MODELS[name], -(-steps // LENGTH)
    shape = (model.experts, model.top_k, batch, groups, LENGTH, seed)
    ids = stream(STRATEGIES[name], *shape)[:steps].numpy()
    return Needs.of(ids, model.experts, WIDE)


def serving(name: str, batch: int, steps: int, seed: int) -> Needs:
    """`batch` lanes, in each of which a sequence follows the last. Their beginnings are
    spread evenly; each begins with a prefill."""
    model, odds = MODELS[name], STRATEGIES[name]
    shape = (seed, model.experts, model.top_k)
    lanes = torch.arange(batch)
    result = []
    for step in range(steps):
        at = step + lanes * LENGTH // batch
        turn, position = at // LENGTH, at % LENGTH
        sequences = turn * batch + lanes + 1
        positions = PROMPT + position
        for sequence in sequences[position == 0]:
            prompt = torch.arange(PROMPT)
            sequences = torch.cat([sequences, sequence.expand(PROMPT)])
            positions = torch.cat([positions, prompt])
        result.append(draw(odds, sequences, positions, *shape).numpy())
    return Needs.of(result, model.experts, WIDE)


def synthetic(steps: int, seeds: int) -> dict[str, list[Needs]]:
    """Every kind of synthetic workload by name, one for each seed."""
    return {
        f"{name}, {kind.__name__}, batch of {batch}": [
            kind(name, batch, steps, seed) for seed in range(seeds)
        ]
        for name in MODELS
        for kind in (decoding, serving)
        for batch in BATCHES
    }


def traced(path: Path) -> list[Needs]:
    """Of each layer of a trace.

    Raises:
        MoEPrefetchError: it cannot be read.
    """
    return [
        Needs(
            layer.num_experts,
            layer.offsets,
            layer.experts,
            np.asarray(layer.rows > WIDE * layer.routed),
        )
        for layer in Trace.read(path).layers
        if len(layer.steps)
    ]
