# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which experts a token needs, drawn by odds.

A token's odds are its sequence's topic, which moves slowly, mixed with what all
sequences have in common. The draw keeps no state: an id follows from the layer, the
sequence, the position and the expert. So it can be repeated, does not depend on the
rest of the batch or on the number of slots, and is safe inside CUDA graphs.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch

NOISE_ROWS, TOPIC_ROWS = 16381, 4093
"""Rows of the tables of random numbers. They are primes, so that a row comes again only
after so many positions of a sequence."""


@dataclass(frozen=True)
class Odds:
    """The log-odds of experts are normal. All zero is uniform routing.

    Attributes:
        fixed: standard deviation of the part that stays for a whole sequence.
        moving: of the part that moves with the position.
        length: positions after which the moving part is another.
        shared: share of the variance of both parts that all sequences have in common;
            of the moving part, those at the same position.
    """

    fixed: float = 0.0
    moving: float = 0.0
    length: int = 1
    shared: float = 0.0


STRATEGIES = {
    "uniform": Odds(),
    "topics-qwen1.5": Odds(fixed=0.42, moving=0.7, length=1, shared=0.55),
    "topics-qwen3": Odds(fixed=1.85, moving=1.7, length=32, shared=0.45),
}
"""Strategies by name. Those with topics are calibrated to what is published of
Qwen1.5-MoE-A2.7B (60 experts, top-4) and of Qwen3-30B-A3B (128 experts, top-8); see
`published`. Any number of experts can be drawn with each."""


@cache
def _tables(
    experts: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Standard normal log-odds, [TOPIC_ROWS, E], and Gumbel noise, [NOISE_ROWS, E]; the
    same numbers on every device."""
    random = torch.Generator().manual_seed(0)
    like = {"generator": random, "dtype": torch.float64}
    topics = torch.randn(TOPIC_ROWS, experts, **like)
    uniform = torch.rand(NOISE_ROWS, experts, **like).clamp_(1e-12, 1 - 1e-12)
    noise = -(-uniform.log()).log()
    return topics.to(device, dtype), noise.to(device, dtype)


def draw(
    odds: Odds,
    sequences: torch.Tensor,
    positions: torch.Tensor,
    layer: int,
    experts: int,
    top_k: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """[tokens, top_k] distinct expert ids, int64; by the Gumbel top-k trick (Kool et
    al., 2019, arXiv 1903.06059).

    Args:
        sequences: [tokens] int64, a number above 0 for each sequence.
        positions: [tokens] int64, in the sequence.
        layer: its number; each layer draws on its own.
        dtype: of the scores that are compared.
    """
    topics, noise = _tables(experts, sequences.device, dtype)

    def topic(sequence: torch.Tensor | int, moment: torch.Tensor | int) -> torch.Tensor:
        """Log-odds; sequence 0 is what all have in common, moment 0 the fixed part."""
        row = (sequence * 2741 + moment * 1597 + layer * 977) % TOPIC_ROWS
        return topics[row]

    def mixed(moment: torch.Tensor | int) -> torch.Tensor:
        own, common = math.sqrt(1 - odds.shared), math.sqrt(odds.shared)
        return own * topic(sequences, moment) + common * topic(0, moment)

    row = sequences * 7919 + positions * 104729 + layer * 1299709
    scores = noise[row % NOISE_ROWS]
    if odds.fixed:
        scores = scores + odds.fixed * mixed(0)
    if odds.moving:
        # From one moment to the next on a circle, which keeps the variance.
        moment = positions // odds.length + 1
        angle = (positions % odds.length).to(dtype) * (math.pi / 2 / odds.length)
        here, there = angle.cos()[:, None], angle.sin()[:, None]
        scores = scores + odds.moving * (here * mixed(moment))
        scores = scores + odds.moving * (there * mixed(moment + 1))
    return scores.topk(top_k).indices


def stream(
    odds: Odds,
    experts: int,
    top_k: int,
    batch: int,
    groups: int,
    length: int,
    layer: int = 0,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """[groups * length, batch, top_k] int64: the ids that `groups` of `batch` sequences
    need, one group after another, each of `length` tokens a sequence."""
    sequences = torch.arange(1, groups * batch + 1).view(groups, 1, batch)
    positions = torch.arange(length).view(1, length, 1)
    tokens = torch.broadcast_tensors(sequences, positions)
    ids = draw(odds, *(t.flatten() for t in tokens), layer, experts, top_k, dtype)
    return ids.view(groups * length, batch, top_k)
