# SPDX-License-Identifier: Apache-2.0
"""What an expert is worth, as one integer each: which resident to evict, which miss to keep.

Values are integers so that the order is total and the same on every device: no clock, no rounding.
"""

from typing import Literal

import numpy as np

FREQUENCY_UNIT = 1 << 10
"""What one need adds to an expert's count, so that halvings keep ten binary places."""

MAX_HALF_LIFE = 1 << 17
"""A count stays below `2 * half_life * FREQUENCY_UNIT`, here 2^28. With the step of the last need
in the 32 bits below, a value stays below 2^61: it and its negative are far from the largest 64-bit
integer, which the kernel gives to what takes no part in a ranking."""


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
        self.last_needed: np.ndarray = np.zeros(num_experts, np.int64)
        self.frequency: np.ndarray = np.zeros(num_experts, np.int64)

    def values(self) -> np.ndarray:
        """Worth of each expert, [E] int64; of equals, the one with the lower id comes first."""
        if self.policy == "lru":
            return self.last_needed
        return (self.frequency << 32) + self.last_needed

    def touch(self, needed: np.ndarray) -> None:
        """Opens the next step and records which experts it needs; `needed` is [E] bool."""
        self.step += 1
        self.last_needed[needed] = self.step
        if self.policy == "lfu":
            if self.step % self.lfu_half_life == 0:
                self.frequency >>= 1
            self.frequency[needed] += FREQUENCY_UNIT
