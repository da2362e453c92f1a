# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The worth of each expert, as one integer. It decides which resident is evicted and
which miss is kept.

Values are integers, so that the order is total and the same on every device: no clock,
no rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

FREQUENCY_UNIT = 1 << 10
"""What one need adds to an expert's count. So halvings keep ten binary places."""

MAX_HALF_LIFE = 1 << 17
"""A count stays below `2 * half_life * FREQUENCY_UNIT`, here 2^28. With the step of the
last need in the 32 bits below, a value stays below 2^61. The value and its negative
are far from the largest 64-bit integer, the kernel's key of what takes no part in a
ranking."""


class ExpertHistory:
    """How recently and how often each expert of a layer was needed.

    Attributes:
        last_needed: [E] int64, the step that last needed the expert. 0 and below: no
            step did, and the order is that of `resume`.
        frequency: [E] int64, decayed count in units of `FREQUENCY_UNIT`.
        step: steps of the layer so far.
    """

    def __init__(
        self, num_experts: int, policy: Literal["lru", "lfu"], lfu_half_life: int
    ):
        self.policy = policy
        self.lfu_half_life = lfu_half_life
        self.step = 0
        self.last_needed: np.ndarray = np.zeros(num_experts, np.int64)
        self.frequency: np.ndarray = np.zeros(num_experts, np.int64)

    def resume(self, ranking: "Ranking") -> None:
        """Begins with the order of `ranking`, before the first step: its experts are
        worth more than all others, the first most. For `lfu` each has its count, which
        decays as any other. A count is at most what this half-life leaves of a need in
        each step."""
        num_residents = len(ranking.experts)
        self.last_needed.fill(-num_residents)
        self.last_needed[ranking.experts] = -np.arange(num_residents)
        if self.policy == "lfu":
            most = self.lfu_half_life * FREQUENCY_UNIT
            self.frequency[ranking.experts] = np.minimum(ranking.counts, most)

    def values(self) -> np.ndarray:
        """Worth of each expert, [E] int64. Of equals, the lower id comes first."""
        if self.policy == "lru":
            return self.last_needed
        return (self.frequency << 32) + self.last_needed

    def touch(self, needed: np.ndarray) -> None:
        """Opens the next step and records which experts it needs; `needed` is [E]
        bool."""
        self.step += 1
        self.last_needed[needed] = self.step
        if self.policy == "lfu":
            if self.step % self.lfu_half_life == 0:
                self.frequency >>= 1
            self.frequency[needed] += FREQUENCY_UNIT


@dataclass(frozen=True)
class Ranking:
    """A layer's residents, the most valuable first: the reverse of the order of
    eviction.

    Attributes:
        experts: their ids.
        counts: the count of each in units of `FREQUENCY_UNIT`, as in
            `ExpertHistory.frequency`; 0 for `lru`, which keeps none.
    """

    experts: list[int]
    counts: list[int]

    @classmethod
    def of(cls, residents: Sequence[int], history: ExpertHistory) -> "Ranking":
        values = history.values().tolist()
        experts = sorted(
            residents, key=lambda expert: (values[expert], expert), reverse=True
        )
        return cls(experts, history.frequency[experts].tolist())

    def fitted(self, num_experts: int, num_slots: int) -> "Ranking":
        """For `num_slots` slots: the most valuable, or all of them and then the experts
        of the lowest ids that are missing."""
        missing = sorted(set(range(num_experts)) - set(self.experts))
        counts = self.counts + [0] * len(missing)
        return Ranking((self.experts + missing)[:num_slots], counts[:num_slots])
