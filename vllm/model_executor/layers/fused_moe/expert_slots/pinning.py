# SPDX-License-Identifier: Apache-2.0
"""Pins host memory where it lies, so that kernels and copies can reach it."""

import torch

from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError


def pin(tensor: torch.Tensor) -> None:
    """Page-locks and maps the bytes of `tensor` (CPU, contiguous) for the life of the process.

    Registered rather than allocated pinned: torch's pinned allocator rounds every request up to a
    power of two, which would nearly double a host store.

    Raises:
        MoEPrefetchError: the driver refuses; says how much was asked for.
    """
    size = tensor.numel() * tensor.element_size()
    status = torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), size, 0)
    if int(status) != 0:
        raise MoEPrefetchError(
            f"the driver could not pin {size:,} bytes of host memory (cudaHostRegister: error "
            f"{int(status)}). Raise the limit of locked memory (ulimit -l) or free host memory."
        )
