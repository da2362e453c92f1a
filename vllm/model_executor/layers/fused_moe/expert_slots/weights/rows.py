# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The tensors that a layer's kernel computes from: staging rows first, then slots."""

from collections.abc import Sequence
from functools import cached_property
from itertools import groupby

import torch

from vllm.model_executor.layers.fused_moe.expert_slots.weights.memory import Memory
from vllm.model_executor.layers.fused_moe.expert_slots.weights.store import ExpertStore


class ExpertRows:
    """A layer's tensors as E rows, of which the last N are slots (`decisions/step.py`).

    Attributes:
        tensors: name -> [E, ...], on the device of `memory`, with the dtype of the
            store's tensor.
        slot_rows: name -> [N, ...], a view of the last rows.
        memory: where the rows lie. Layers that share it share their staging rows.
    """

    def __init__(self, store: ExpertStore, num_slots: int, memory: Memory):
        self.store = store
        self.num_slots = num_slots
        self.num_staged = store.num_experts - num_slots
        self.memory = memory
        self.tensors = {
            name: memory.tensor(name, home.shape, home.dtype, self.num_staged)
            for name, home in store.tensors.items()
        }
        self.slot_rows = {
            name: tensor[self.num_staged :] for name, tensor in self.tensors.items()
        }

    @property
    def slot_bytes(self) -> int:
        return self.store.bytes_per_expert * self.num_slots

    @cached_property
    def _rows(self) -> list[tuple[torch.Tensor, ...]]:
        return list(zip(*(t.unbind() for t in self.tensors.values()), strict=True))

    @cached_property
    def _homes(self) -> list[tuple[torch.Tensor, ...]]:
        return list(
            zip(*(t.unbind() for t in self.store.tensors.values()), strict=True)
        )

    def load(self, experts: Sequence[int], rows: Sequence[int]) -> None:
        """Copies each of `experts` from the store into the row of the same place in
        `rows`. For the CPU platform only: on a GPU a kernel loads."""
        for expert, row in zip(experts, rows, strict=True):
            torch._foreach_copy_(self._rows[row], self._homes[expert])

    def fill_slots(self, residents: Sequence[int]) -> None:
        """Loads all slots.

        Args:
            residents: the expert of each slot, N of them. Ids that follow each other
                are copied together: experts 0 ... N-1 take one copy a tensor.
        """
        for _, run in groupby(
            enumerate(residents), key=lambda entry: entry[1] - entry[0]
        ):
            together = list(run)
            (slot, expert), count = together[0], len(together)
            for name, rows in self.slot_rows.items():
                rows[slot : slot + count].copy_(
                    self.store.tensors[name][expert : expert + count]
                )
