# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Stock's processing of a layer's experts, a part of them at a time: the layers of the
largest models are larger than a GPU's memory."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

from vllm.model_executor.layers.fused_moe.expert_slots.weights.bundle import (
    FEW,
    Bundle,
    chosen_experts,
    made_alone,
    parameters_of_experts,
)
from vllm.model_executor.layers.fused_moe.expert_slots.weights.host_pages import (
    host_tensor,
)

PART_BYTES = 128 << 20
"""About the bytes of a part, as it was read. A window of the checkpoint has as many."""

_TORCHS = ("_parameters", "_buffers", "_modules")


def parts_of(layer: Any) -> list[range]:
    """The experts of a layer in parts of about the same size; in one part if an expert
    cannot be processed without the others.

    Args:
        layer: a `RoutedExperts` that has not been processed, on any device.
    """
    experts = layer.local_num_experts
    if not made_alone(layer):
        return [range(experts)]
    read = sum(p.nbytes for p in parameters_of_experts(layer).values())
    at_least = max(FEW, PART_BYTES * experts // read)
    count = max(1, experts // at_least)
    ends = [experts * part // count for part in range(count + 1)]
    return [range(*part) for part in pairwise(ends)]


def process_in_parts(
    layer: Any,
    process: Callable[[Any], None],
    device: torch.device,
    parts: list[range],
) -> tuple[Bundle, dict[str, torch.Tensor]]:
    """Processes a layer's experts, which were read into host memory.

    Args:
        layer: a `RoutedExperts`. Afterwards it is as if it had the last part alone.
        process: stock's processing.
        device: on which stock processes.
        parts: of `parts_of`.

    Returns:
        The layer's tensors, with the last part's experts; and those of all experts, by
        the same names, in host memory: [E, ...] each.
    """
    owners = (layer, layer.quant_method)
    read = [_copied(vars(owner)) for owner in owners]
    homes: dict[str, torch.Tensor] = {}
    for part in parts:
        # What the part before was made into is freed here, before the next is made.
        for owner, state in zip(owners, read, strict=True):
            vars(owner).clear()
            vars(owner).update(_copied(state))
        bundle = None
        with chosen_experts(layer, device, part):
            process(layer)
        bundle = Bundle.of(layer, len(part))
        for name, rows in bundle.tensors().items():
            if name not in homes:
                shape = (parts[-1].stop, *rows.shape[1:])
                homes[name] = host_tensor(shape, rows.dtype)
            homes[name][part.start : part.stop].copy_(rows)
            del rows
    assert bundle is not None
    return bundle, homes


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """An object's attributes, with copies of those in which torch keeps parameters,
    buffers and modules."""
    return state | {name: state[name].copy() for name in _TORCHS if name in state}
