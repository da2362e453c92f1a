# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which steps of a trace decode and which read prompts, and how many tokens they
have."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm.model_executor.layers.fused_moe.expert_slots.trace.reading import LayerTrace

DECODE, PREFILL = 0, 1
"""Kinds of steps, which are counted apart. A step with a prompt in it is `PREFILL`."""


def kinds_of(layer: LayerTrace, max_num_seqs: int) -> np.ndarray:
    """The kind of each step, [n] int8.

    A trace has the number of tokens of a step, not of its sequences. A step that only
    decodes has a token of each sequence, so at most `max_num_seqs`. Each of these
    sequences was in the step before, so it has no more tokens than that. Few sequences
    end at the same time, so it has no more than twice those of the step after. A new
    prompt is larger than its neighbours, unless it is as short as the batch is large.
    """
    rows = layer.rows.astype(float)
    before = np.concatenate(([0.0], rows[:-1]))
    after = np.concatenate((rows[1:], rows[-1:]))
    # Under expert parallelism the rows of a token vary: four deviations.
    varies = layer.routed != layer.top_k
    decodes = rows <= max_num_seqs * layer.routed
    for limit in (before, 2 * after):
        decodes &= rows <= limit + varies * (4 * np.sqrt(limit) + 4)
    return np.where(decodes, DECODE, PREFILL).astype(np.int8)


@dataclass(frozen=True)
class Work:
    """What the model did while it was recorded.

    Attributes:
        steps: of the model, (decode, prefill).
        tokens: of these, likewise.
    """

    steps: tuple[int, int]
    tokens: tuple[float, float]

    @classmethod
    def of(cls, layers: Sequence[tuple[LayerTrace, np.ndarray]]) -> "Work":
        """Those of the middle layer: a layer of a draft model makes other steps.

        Args:
            layers: of one run, each with its `kinds_of`.
        """
        amounts = np.array([_amounts(*layer) for layer in layers])
        middle = np.quantile(amounts, 0.5, axis=0, method="lower").tolist()
        (decode, prefill), tokens = middle
        return cls((int(decode), int(prefill)), tuple(tokens))

    def __add__(self, other: "Work") -> "Work":
        return Work(
            (self.steps[0] + other.steps[0], self.steps[1] + other.steps[1]),
            (self.tokens[0] + other.tokens[0], self.tokens[1] + other.tokens[1]),
        )


def _amounts(layer: LayerTrace, kinds: np.ndarray) -> list[np.ndarray]:
    rows = np.bincount(kinds, layer.rows, minlength=2)
    return [np.bincount(kinds, minlength=2), rows / layer.routed]
