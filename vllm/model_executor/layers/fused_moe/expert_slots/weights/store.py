# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The experts of a layer in host memory, complete, and not written after loading."""

from dataclasses import fields
from typing import Any

import torch

from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError

_NOT_IN_SLOTS = {
    "e_score_correction_bias",
    "hash_indices_table",
    "w13_input_scale",
    "w2_input_scale",
}
"""Parameters of a layer that may have a row for each expert and yet do not belong to
it: those of the router, which sees all experts, and activation scales, which are one
value for all experts. vLLM's EPLB leaves out the same
(`RoutedExperts.get_expert_weights`)."""


class ExpertStore:
    """All experts of one layer.

    Attributes:
        tensors: parameter name -> [E, ...] host tensor.
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


def per_expert_parameters(
    layer: torch.nn.Module, num_experts: int, only: set[str] | None = None
) -> dict[str, torch.nn.Parameter]:
    """The layer's parameters that have a row for each expert.

    Args:
        layer: a `RoutedExperts`.
        num_experts: rows that such a parameter has.
        only: the names to choose from; all if None.

    Raises:
        MoEPrefetchError: the quantisation config holds per-expert tensors that are not
            parameters of the layer, so slots cannot follow them.
    """
    parameters = {
        name: parameter
        for name, parameter in layer.named_parameters(recurse=False)
        if parameter.dim() > 0
        and parameter.shape[0] == num_experts
        and name not in _NOT_IN_SLOTS
        and (only is None or name in only)
    }
    storages = {p.untyped_storage().data_ptr() for p in parameters.values()}
    identities = {id(p) for p in parameters.values()}
    method: Any = layer.quant_method
    quant_config = method.moe_quant_config
    for side in ("_w1", "_w2"):
        descriptor = getattr(quant_config, side, None)
        for field in fields(descriptor) if descriptor is not None else ():
            value = getattr(descriptor, field.name)
            if not isinstance(value, torch.Tensor) or id(value) in identities:
                continue
            if value.dim() > 0 and value.shape[0] == num_experts:
                copy = (
                    "a view"
                    if value.untyped_storage().data_ptr() in storages
                    else "a copy"
                )
                raise MoEPrefetchError(
                    f"{layer.layer_name} ({type(layer).__name__}): the quantisation "
                    f"config of {type(layer.quant_method).__name__} keeps {copy} of "
                    f"per-expert data in {side}.{field.name}, which expert slots "
                    "cannot follow. Serve this model without --moe-gpu-prefetch."
                )
    return parameters
