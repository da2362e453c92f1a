# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The experts of a layer in host memory, complete, and not written after loading."""

import torch


class ExpertStore:
    """All experts of one layer.

    Attributes:
        tensors: name -> [E, ...] host tensor, as in a `Bundle`.
        num_experts: E.
        bytes_per_expert: bytes of one expert in all tensors.
    """

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.tensors = tensors
        self.num_experts = next(iter(tensors.values())).shape[0]
        self.bytes_per_expert = sum(
            t[0].numel() * t.element_size() for t in tensors.values()
        )

    @property
    def num_bytes(self) -> int:
        return self.bytes_per_expert * self.num_experts
