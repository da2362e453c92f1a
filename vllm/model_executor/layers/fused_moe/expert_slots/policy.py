# SPDX-License-Identifier: Apache-2.0
"""The order of victims: what a resident expert is worth, as one integer per slot.

Values are integers so that the order is total and the same on every device: no clock, no rounding.
"""

from typing import Literal

import torch

FREQUENCY_UNIT = 1 << 10
"""What one need adds to an expert's count, so that halvings keep ten binary places."""


class ExpertHistory:
    """How recently and how often each expert of a layer was needed.

    Attributes:
        last_needed: [E + 1] int64, the step that last needed the expert, 0 for never. The last
            entry stands for an empty slot (id -1) and stays -1: empty slots are taken first.
        frequency: [E + 1] int64, decayed count in units of `FREQUENCY_UNIT`; last entry -1.
        step: steps seen by the layer.
    """

    def __init__(self, num_experts: int, policy: Literal["lru", "lfu"], lfu_half_life: int):
        self.policy = policy
        self.lfu_half_life = lfu_half_life
        self.step = 0
        self.last_needed = torch.zeros(num_experts + 1, dtype=torch.int64)
        self.frequency = torch.zeros(num_experts + 1, dtype=torch.int64)
        self.last_needed[-1] = -1
        self.frequency[-1] = -1

    def values(self, slot_to_expert: torch.Tensor) -> torch.Tensor:
        """Worth of each slot, [N] int64; the lowest is evicted first, ties by slot number."""
        recency = self.last_needed[slot_to_expert]
        if self.policy == "lru":
            return recency
        return self.frequency[slot_to_expert] * (1 << 32) + recency

    def touch(self, needed: torch.Tensor) -> None:
        """Opens the next step and records that it needs the experts `needed`, [n] int64."""
        self.step += 1
        self.last_needed.index_fill_(0, needed, self.step)
        if self.policy == "lfu":
            if self.step % self.lfu_half_life == 0:
                self.frequency[:-1] >>= 1
            self.frequency[needed] += FREQUENCY_UNIT
