# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Memory of expert tensors on the CPU platform: the layout of a GPU's, by files in
memory that are mapped several times."""

import errno
import mmap
import os

import torch

from vllm.model_executor.layers.fused_moe.expert_slots.weights.host_pages import (
    MAP_FIXED,
    map_memory,
    pages_of,
    unmap_memory,
)
from vllm.model_executor.layers.fused_moe.expert_slots.weights.memory import Memory

_MFD_NOEXEC_SEAL = 8
"""A flag of memfd_create. It is required where the administrator set
vm.memfd_noexec=2, and kernels before 6.3 do not know it."""


class CPUMemory(Memory):
    """Tensors in host memory. Kernels run on the host, so `pin` registers nothing."""

    page = mmap.PAGESIZE
    torch_device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__(os.close, lambda: False)

    def pin(self, tensor: torch.Tensor, read_only: bool = False) -> int:
        if read_only:
            pages = pages_of(tensor)
            assert pages is not None, (
                "only a tensor on pages of its own can be protected"
            )
            pages.protect()
        return tensor.data_ptr()

    def _create(self, size: int) -> int:
        descriptor = _memory_file()
        try:
            os.ftruncate(descriptor, size)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _map(self, shared: list[tuple[int, int]], private: int) -> int:
        total = sum(size for size, _ in shared) + private
        address = map_memory(total, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        try:
            end = address
            for size, descriptor in shared:
                map_memory(size, mmap.MAP_SHARED | MAP_FIXED, descriptor, address=end)
                end += size
        except BaseException:
            unmap_memory(address, total)
            raise
        return address

    def _unmap(self, address: int, sizes: list[int]) -> None:
        unmap_memory(address, sum(sizes))


def _memory_file() -> int:
    try:
        return os.memfd_create("expert-staging", os.MFD_CLOEXEC | _MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.memfd_create("expert-staging", os.MFD_CLOEXEC)
