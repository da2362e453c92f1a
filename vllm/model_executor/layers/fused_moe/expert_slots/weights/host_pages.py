# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Host memory in pages of its own.

Memory is pinned and protected by pages. What shares a page with it would be pinned and
protected too.
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
"""A flag of mmap that Python's module lacks."""

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
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_MAP_FAILED = ctypes.c_void_p(-1).value


def map_memory(
    size: int,
    flags: int,
    descriptor: int = -1,
    offset: int = 0,
    address: int | None = None,
) -> int:
    """Maps memory that can be read and written.

    Args:
        size: in bytes.
        flags: of mmap.
        descriptor: of the file, or -1 for none.
        offset: into the file.
        address: where to map, with `MAP_FIXED`.

    Returns:
        The address.

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
    """Memory in the form that numpy and torch accept, as bytes: their protocols have
    neither bfloat16 nor float8."""

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
    """A tensor over the memory of `owner`, which it keeps alive.

    Args:
        owner: has `address`, and `size` in bytes.
        dtype: of the tensor.
        shape: of the tensor; it covers the memory.
        device: where the memory is.
    """
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
    return flat.view(dtype).view(torch.Size(shape))


class HostPages:
    """Host memory that starts on a page and shares no page with other memory.

    It is freed when nothing refers to this object any more. A tensor made of it does.

    Attributes:
        address: of the first byte.
        size: in bytes.
    """

    _free: weakref.finalize | None = None

    def __init__(self, size: int):
        self._take(map_memory(size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), size)

    @classmethod
    def of_file(cls, descriptor: int, size: int, offset: int) -> "HostPages":
        """Part of a file. What is written to the memory is in the file.

        Args:
            descriptor: of the file, open for reading and writing.
            size: of the part in bytes.
            offset: of the part in the file, a multiple of a page.
        """
        pages = cls.__new__(cls)
        pages._take(map_memory(size, mmap.MAP_SHARED, descriptor, offset), size)
        return pages

    def _take(self, address: int, size: int) -> None:
        self.address, self.size = address, size
        self.free_by(unmap_memory, address, size)
        _pages[address] = self

    def free_by(self, free: Callable[..., object], *arguments: Any) -> None:
        """Has `free(*arguments)` called when nothing refers to this memory any more.
        It must unmap the memory."""
        if self._free is not None:
            self._free.detach()
        self._free = weakref.finalize(self, free, *arguments)
        self._free.atexit = False  # the end of the process frees the memory

    def tensor(self, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
        """All of this memory as a tensor."""
        return tensor_over(self, dtype, shape, torch.device("cpu"))

    def protect(self) -> None:
        """Makes the memory read-only: from now on, a write ends the process."""
        if _libc.mprotect(self.address, self.size, mmap.PROT_READ):
            raise _refused(self.size, "protected")


_pages: "weakref.WeakValueDictionary[int, HostPages]" = weakref.WeakValueDictionary()


def pages_of(tensor: torch.Tensor) -> HostPages | None:
    """The pages at whose start `tensor` lies, or None if it has no pages of its
    own."""
    return _pages.get(tensor.data_ptr()) if tensor.device.type == "cpu" else None


def forget_rows(tensor: torch.Tensor, rows: range) -> None:
    """Gives the operating system the memory of some rows of a tensor on pages of its
    own. Whole pages are zero from now on; a page with other rows on it stays. Does
    nothing if the tensor has no pages of its own, or if the system refuses.

    Args:
        tensor: [R, ...], of `host_tensor`.
        rows: within R.
    """
    pages = pages_of(tensor)
    if pages is None:
        return
    row_bytes = tensor.nbytes // len(tensor)
    begin = -(-rows.start * row_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
    end = rows.stop * row_bytes
    if rows.stop < len(tensor):
        end = end // mmap.PAGESIZE * mmap.PAGESIZE
    if begin < end:
        _libc.madvise(pages.address + begin, end - begin, mmap.MADV_DONTNEED)


def host_tensor(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of zeros on pages of its own."""
    return HostPages(torch.Size(shape).numel() * dtype.itemsize).tensor(dtype, shape)
