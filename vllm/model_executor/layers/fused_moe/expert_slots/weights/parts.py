# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Stock's processing of a layer's experts, a part of them at a time: the layers of the
largest models are larger than a GPU's memory."""

from collections.abc import Callable
from itertools import pairwise
from math import ceil
from typing import Any

import torch

from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError
from vllm.model_executor.layers.fused_moe.expert_slots.weights.bundle import (
    FEW,
    Bundle,
    chosen_experts,
    kinds_of_rows,
    made_alone,
    parameters_of_experts,
)
from vllm.model_executor.layers.fused_moe.expert_slots.weights.host_pages import (
    forget_rows,
    host_tensor,
)

PART_BYTES = 128 << 20
"""The most bytes of a part, as it was read, if that is at least `FEW` + 1 experts. A
window of the checkpoint has as many."""

_TORCH_STATE = ("_parameters", "_buffers", "_modules")


def experts_at_a_time(layer: Any) -> int:
    """The most experts that a part of a layer has, and those of a layer with fewer
    experts of the same size: all if an expert cannot be processed without the others.

    Args:
        layer: a `RoutedExperts` that has not been processed, on any device.
    """
    experts = layer.local_num_experts
    if not made_alone(layer):
        return experts
    read = sum(p.nbytes for p in parameters_of_experts(layer).values())
    # With one more than FEW, no number of experts leaves a part with less than FEW.
    return min(experts, max(FEW + 1, PART_BYTES * experts // read))


def parts_of(layer: Any) -> list[range]:
    """The experts of a layer in parts of about the same size, `experts_at_a_time` at
    most and no less than `FEW`."""
    experts = layer.local_num_experts
    count = ceil(experts / experts_at_a_time(layer))
    ends = [experts * part // count for part in range(count + 1)]
    return [range(*part) for part in pairwise(ends)]


def process_in_parts(
    layer: Any, process: Callable[[Any], None], device: torch.device
) -> tuple[Bundle, dict[str, torch.Tensor]]:
    """Processes a layer's experts, which were read into host memory. They are lost.

    Args:
        layer: a `RoutedExperts`. Afterwards it is as if it had the last part alone.
        process: stock's processing.
        device: on which stock processes.

    Returns:
        The layer's tensors, with the last part's experts; and those of all experts, by
        the same names, in host memory: [E, ...] each.

    Raises:
        MoEPrefetchError: parts became different tensors, or have different values that
            hold for all experts.
    """
    owners = (layer, layer.quant_method)
    read = [_copied(vars(owner)) for owner in owners]
    experts = [p.data for p in parameters_of_experts(layer).values()]
    homes: dict[str, torch.Tensor] = {}
    first_values: dict[str, torch.Tensor] = {}
    for part in parts_of(layer):
        # What the part before was made into is freed here, before the next is made.
        for owner, state in zip(owners, read, strict=True):
            vars(owner).clear()
            vars(owner).update(_copied(state))
        bundle = None
        with chosen_experts(layer, device, part):
            process(layer)
        for tensor in experts:
            forget_rows(tensor, part)
        bundle = Bundle.of(layer, len(part))
        made, values = bundle.tensors(), bundle.values()
        if not homes:
            homes = {
                name: host_tensor((layer.local_num_experts, *t.shape[1:]), t.dtype)
                for name, t in made.items()
            }
            first_values = values
        _check_alike(layer, made, homes, values, first_values)
        for name, home in homes.items():
            home[part.start : part.stop].copy_(made[name])
        del made
    assert bundle is not None
    return bundle, homes


def _check_alike(
    layer: Any,
    made: dict[str, torch.Tensor],
    homes: dict[str, torch.Tensor],
    values: dict[str, torch.Tensor],
    first_values: dict[str, torch.Tensor],
) -> None:
    """Checks that a part became what the first part did.

    Raises:
        MoEPrefetchError: it did not.
    """
    same = values.keys() == first_values.keys() and all(
        value.dtype == first_values[name].dtype
        and torch.equal(value, first_values[name])
        for name, value in values.items()
    )
    if kinds_of_rows(made) != kinds_of_rows(homes) or not same:
        raise MoEPrefetchError(
            f"{layer.layer_name}: {type(layer.quant_method).__name__} made other "
            "tensors, or other values that hold for all experts, of some experts than "
            "of others, so they cannot be processed in parts. Serve without "
            "--moe-gpu-prefetch."
        )


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """An object's attributes, with copies of those in which torch keeps parameters,
    buffers and modules."""
    return state | {name: state[name].copy() for name in _TORCH_STATE if name in state}
