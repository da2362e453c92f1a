# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The host tensors that become a layer's store: this process's pages, or those of a
shared store."""

import torch

from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError
from vllm.model_executor.layers.fused_moe.expert_slots.weights.bundle import (
    Bundle,
    kinds_of_rows,
)
from vllm.model_executor.layers.fused_moe.expert_slots.weights.host_pages import (
    host_tensor,
    pages_of,
)


def own_pages(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`tensors`, those copied to the host that are elsewhere or share pages with other
    memory."""
    homes = {}
    for name, tensor in tensors.items():
        pages = pages_of(tensor) if tensor.device.type == "cpu" else None
        if pages is None or pages.size != tensor.nbytes:
            tensor = host_tensor(tensor.shape, tensor.dtype).copy_(tensor)
        homes[name] = tensor
    return homes


def check_stored(
    stored: dict[str, torch.Tensor], bundle: Bundle, layer_name: str
) -> None:
    """Checks that what a shared store holds is what a layer needs.

    Args:
        stored: the store's tensors of the layer.
        bundle: of the layer, with a few experts.
        layer_name: for the message.

    Raises:
        MoEPrefetchError: it is not.
    """
    values = bundle.values()
    needed = kinds_of_rows(bundle.tensors())
    found = kinds_of_rows({n: t for n, t in stored.items() if n not in values})
    if found != needed or not values.keys() <= stored.keys():
        raise MoEPrefetchError(
            f"the shared store holds {layer_name} as {_in_words(found)}, this model "
            f"needs {_in_words(needed)}. Remove it with vllm-moe-prefetch stores "
            "DIRECTORY --remove."
        )


def _in_words(rows: dict[str, tuple[torch.Size, torch.dtype]]) -> str:
    return ", ".join(
        f"{name} {list(shape)} {str(dtype).removeprefix('torch.')}"
        for name, (shape, dtype) in sorted(rows.items())
    )
