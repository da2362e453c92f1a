# SPDX-License-Identifier: Apache-2.0
"""Page-locks host memory where it lies, so that kernels and copies can reach it.

Registered rather than allocated pinned: torch's pinned allocator rounds every request up to a power
of two, which would nearly double a host store.
"""

import mmap

import torch

from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError

_OWN_PAGES = 64 << 20
"""From this size on, the C library gives an allocation pages of its own (its limit is 32 MiB)."""


_READ_ONLY = 8
"""cudaHostRegisterReadOnly: pages that are mapped read-only are refused without it."""


def pin(tensor: torch.Tensor, read_only: bool = False) -> None:
    """Page-locks the bytes of `tensor` (CPU, contiguous) for the life of the process. No other
    pinned tensor may share a page with it.

    Raises:
        MoEPrefetchError: the driver refuses; says how much was asked for.
    """
    size = tensor.numel() * tensor.element_size()
    status = torch.cuda.cudart().cudaHostRegister(
        tensor.data_ptr(), size, _READ_ONLY if read_only else 0
    )
    if int(status) != 0:
        raise MoEPrefetchError(
            f"the driver could not pin {size:,} bytes of host memory (cudaHostRegister: error "
            f"{int(status)}). Raise the limit of locked memory (ulimit -l) or free host memory."
        )


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in page-locked memory: itself, or a copy if it may share pages with others."""
    tensor = own_pages(tensor)
    pin(tensor)
    return tensor


def own_pages(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, contiguous, in memory whose pages it shares with nobody."""
    tensor = tensor.contiguous()
    size = tensor.numel() * tensor.element_size()
    if size >= _OWN_PAGES:
        return tensor
    pages = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
    return pages.view(tensor.dtype).view(tensor.shape).copy_(tensor)
