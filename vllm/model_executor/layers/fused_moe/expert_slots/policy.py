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
        last_needed: [E] int64, the step that last needed the expert, 0 for never.
        frequency: [E] int64, decayed count in units of `FREQUENCY_UNIT`.
        step: steps seen by the layer.
    """

    def __init__(self, num_experts: int, policy: Literal["lru", "lfu"], lfu_half_life: int):
        self.policy = policy
        self.lfu_half_life = lfu_half_life
        self.step = 0
        self.last_needed = torch.zeros(num_experts, dtype=torch.int64)
        self.frequency = torch.zeros(num_experts, dtype=torch.int64)

    def values(self, slot_to_expert: torch.Tensor) -> torch.Tensor:
        """Worth of each slot, [N] int64; the lowest is evicted first, ties by slot number."""
        recency = self.last_needed.index_select(0, slot_to_expert)
        if self.policy == "lru":
            return recency
        return recency.add_(self.frequency.index_select(0, slot_to_expert), alpha=1 << 32)

    def touch(self, needed: torch.Tensor) -> None:
        """Opens the next step and records whom it needs; `needed` is [E] bool."""
        self.step += 1
        self.last_needed.masked_fill_(needed, self.step)
        if self.policy == "lfu":
            if self.step % self.lfu_half_life == 0:
                self.frequency >>= 1
            self.frequency.add_(needed, alpha=FREQUENCY_UNIT)
