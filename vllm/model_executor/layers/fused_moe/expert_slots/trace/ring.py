# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A layer's last steps in host memory. What decides a step writes it, a thread of the
worker reads it."""

import numpy as np
import torch

from vllm.model_executor.layers.fused_moe.expert_slots.weights.host_pages import (
    HostPages,
)

RECORDS = 4096
"""Steps that a ring holds: eight seconds at 500 steps a second. A power of two."""

HEAD = 2
"""Words of a record in front of the set: the number of the step, and its rows."""

_BEHIND = 64
"""Steps that the writer may be ahead of the count that a reader sees."""


def words_of(num_experts: int) -> int:
    """32-bit words of a set of experts: one bit for each, the lowest first."""
    return -(-num_experts // 32)


class TraceRing:
    """The last `RECORDS` steps of one layer.

    A record has the number of the step (the low 32 bits), its rows, which are the pairs
    of a token and an expert of this rank, and the set of needed experts as bits. The
    record of a step lies at its number, so the count of steps in the layer's counters
    says which records are there.

    Args:
        num_experts: E.

    Attributes:
        set_bytes: bytes of a set of experts in a file.
        tensor: [RECORDS, HEAD + words] int32 in host memory, at the start of pages of
            its own, so a memory can pin it and a kernel can write it.
    """

    def __init__(self, num_experts: int):
        self.set_bytes = -(-num_experts // 8)
        shape = (RECORDS, HEAD + words_of(num_experts))
        self.tensor = HostPages(4 * shape[0] * shape[1]).tensor(torch.int32, shape)
        self._records = self.tensor.numpy()

    def write(self, step: int, rows: int, needed: np.ndarray) -> None:
        """Writes one step.

        Args:
            step: its number, from 1.
            rows: pairs of a token and an expert.
            needed: [E] bool.
        """
        record = self._records[(step - 1) % RECORDS]
        record[0], record[1] = np.int64(step).astype(np.int32), rows
        packed = np.packbits(needed, bitorder="little")
        record[HEAD:].view(np.uint8)[: self.set_bytes] = packed

    def clear(self) -> None:
        """Forgets all steps, before their numbers begin anew."""
        self._records.fill(0)

    def read(self, first: int, last: int) -> np.ndarray:
        """Copies of the records of the steps `first` ... `last`, [n, HEAD + words]
        int32; at most `RECORDS`."""
        at = np.arange(first - 1, last) % RECORDS
        return self._records[at]

    @staticmethod
    def oldest(steps: int) -> int:
        """The oldest step that is certainly whole while the layer's count is
        `steps`."""
        return max(1, steps + 1 + _BEHIND - RECORDS)
