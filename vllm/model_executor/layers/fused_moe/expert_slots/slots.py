# SPDX-License-Identifier: Apache-2.0
"""The fixed device tensors that hold the resident experts."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vllm.model_executor.layers.fused_moe.expert_slots.host_store import ExpertStore


class SlotBuffers:
    """N slots of one layer: the layer's own parameters, shrunk from [E, ...] to [N, ...].

    The parameters keep their identity and only change their data, so that whatever refers to them
    (quantisation config, kernels) follows.
    """

    def __init__(
        self,
        parameters: dict[str, torch.nn.Parameter],
        store: ExpertStore,
        num_slots: int,
        device: torch.device,
    ):
        self.store = store
        self.num_slots = num_slots
        self._parameters = parameters
        self.tensors = {
            name: torch.empty((num_slots, *master.shape[1:]), dtype=master.dtype, device=device)
            for name, master in store.tensors.items()
        }
        for name, parameter in parameters.items():
            parameter.data = self.tensors[name]
        self._rows = list(zip(*(t.unbind() for t in self.tensors.values()), strict=True))
        self._homes = list(zip(*(t.unbind() for t in store.tensors.values()), strict=True))

    @property
    def num_bytes(self) -> int:
        return self.store.bytes_per_expert * self.num_slots

    def load(self, experts: torch.Tensor, slots: torch.Tensor) -> None:
        """Copies `experts` from the store into `slots`, both [n] int64, in their order: where a
        slot comes up twice, the later expert stays."""
        for expert, slot in zip(experts.tolist(), slots.tolist(), strict=True):
            torch._foreach_copy_(self._rows[slot], self._homes[expert])

    @contextmanager
    def reading_store(self) -> Iterator[None]:
        """Within, the layer's parameters are the store's [E, ...] tensors: where slots and store
        are one memory (the CPU platform), a kernel can read every expert in place."""
        for name, parameter in self._parameters.items():
            parameter.data = self.store.tensors[name]
        try:
            yield
        finally:
            for name, parameter in self._parameters.items():
                parameter.data = self.tensors[name]
