# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Host memory in pages of its own.

Memory is pinned and protected by pages: whatever shares a page with it would be pinned
and protected too.
"""

import ctypes
import errno
import mmap
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError

MAP_FIXED = 0x10
"""Not among Python's names."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_MAP_FAILED = ctypes.c_void_p(-1).value


def map_memory(
    size: int,
    flags: int,
    descriptor: int = -1,
    offset: int = 0,
    address: int | None = None,
) -> int:
    """Maps memory that can be read and written, and returns its address.

    Raises:
        MoEPrefetchError: the operating system refuses.
    """
    readable = mmap.PROT_READ | mmap.PROT_WRITE
    result = _libc.mmap(address, size, readable, flags, descriptor, offset)
    if result == _MAP_FAILED:
        raise _refused(size, "mapped")
    return result


def unmap_memory(address: int, size: int) -> None:
    _libc.munmap(address, size)


_LOCKED = "Raise the limit of locked memory (ulimit -l)"
_ADVICE = {
    errno.ENOMEM: "Free host memory, or raise the limit of address space "
    "(ulimit -v) or of mappings (sysctl vm.max_map_count)",
    errno.EAGAIN: _LOCKED,
    errno.EPERM: _LOCKED,
    errno.ENOSPC: "Free room in the file system that holds the memory (df -h /dev/shm)",
    errno.EACCES: "Give this user the right to read and write the file",
    errno.ENODEV: "Name a directory in shared memory (/dev/shm): this file system maps "
    "no memory",
}


def _refused(size: int, what: str) -> MoEPrefetchError:
    error = ctypes.get_errno()
    return MoEPrefetchError(
        f"{size:,} bytes of host memory cannot be {what}: {os.strerror(error)}. "
        f"{_ADVICE.get(error, 'Look up what this error means here')}, or serve without "
        "--moe-gpu-prefetch."
    )


class _Bytes:
    """Memory as numpy and torch take it, by bytes: they know neither bfloat16 nor
    float8 there."""

    def __init__(self, owner: object, address: int, size: int, protocol: str):
        self._owner = owner
        description = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }
        setattr(self, protocol, description)


def tensor_over(
    owner: Any, dtype: torch.dtype, shape: Sequence[int], device: torch.device
) -> torch.Tensor:
    """A tensor over the memory of `owner` (`address`, `size`), which it keeps alive."""
    if device.type == "cuda":
        holder = _Bytes(owner, owner.address, owner.size, "__cuda_array_interface__")
        # Without a device torch would return a copy in host memory.
        flat = torch.as_tensor(holder, device=device)
    else:
        holder = _Bytes(owner, owner.address, owner.size, "__array_interface__")
        flat = torch.from_numpy(np.asarray(holder))
    assert flat.data_ptr() == owner.address, (
        "torch copied the memory instead of using it"
    )
    return flat.view(dtype).view(*shape)


class HostPages:
    """Host memory that starts on a page and shares its pages with nobody.

    It lives as long as something refers to this object; a tensor made from it does.
    """

    _free: weakref.finalize | None = None

    def __init__(self, size: int):
        self._take(map_memory(size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), size)

    @classmethod
    def of_file(cls, descriptor: int, size: int, offset: int) -> "HostPages":
        """Part of a file that is open for reading and writing; `offset` is a multiple
        of a page. What is written is in the file."""
        pages = cls.__new__(cls)
        pages._take(map_memory(size, mmap.MAP_SHARED, descriptor, offset), size)
        return pages

    def _take(self, address: int, size: int) -> None:
        self.address, self.size = address, size
        self.free_by(unmap_memory, address, size)
        _pages[address] = self

    def free_by(self, free: Callable[..., object], *arguments: Any) -> None:
        """Lets `free` free this memory when nobody refers to it any more; it must unmap
        it."""
        if self._free is not None:
            self._free.detach()
        self._free = weakref.finalize(self, free, *arguments)
        self._free.atexit = False  # the end of the process frees it

    def tensor(self, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
        """All of this memory as a tensor."""
        return tensor_over(self, dtype, shape, torch.device("cpu"))

    def protect(self) -> None:
        """From now on, a write ends the process."""
        if _libc.mprotect(self.address, self.size, mmap.PROT_READ):
            raise _refused(self.size, "protected")


_pages: "weakref.WeakValueDictionary[int, HostPages]" = weakref.WeakValueDictionary()


def pages_of(tensor: torch.Tensor) -> HostPages | None:
    """The pages that `tensor` lies at the start of, if it is on pages of its own."""
    return _pages.get(tensor.data_ptr()) if tensor.device.type == "cpu" else None


def host_tensor(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of zeros on pages of its own."""
    return HostPages(torch.Size(shape).numel() * dtype.itemsize).tensor(dtype, shape)
