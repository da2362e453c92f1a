# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The part of a stand-in for `cuda.bindings.driver` that plays the documented rules of
virtual memory management, on real memory.

Physical memory is a memfd, a mapping is mmap: two mappings of one handle see each
other's bytes, an address without access faults, and memory is counted until the last
mapping *and* the last handle are gone.

Rules (CUDA driver API 13, "Virtual Memory Management"):
  reserve   size a multiple of the host page, alignment zero or a power of two, flags 0
  create    size a multiple of the granularity, a valid device, pinned memory, flags 0;
            no memory
  map       range within one reservation and not mapped; address, size and offset
            multiples of the granularity; offset 0 ("currently must be zero"); whole
            handles only (stricter than documented: `partial_maps`)
  access    the range is made of whole mappings; a mapping without access faults
  unmap     the range is one whole mapping (stricter than practised: `joint_unmap`)
  release   a handle once; its memory stays while mapped
  free      exactly what was reserved, nothing mapped in it
Also: memory for RDMA has no access under WSL2 (pytorch #192330). To unmap what a kernel
still uses fails the test.
"""

import ctypes
import mmap
import os
from types import SimpleNamespace

from tests.support.fake_context import FakeContext


class FakeVirtualMemory(FakeContext):
    """Reservations, physical memory and its mappings.

    Attributes:
        handles: the physical memory of each handle; it may outlive the handle.
        reservations: the size in bytes of each, by address.
        mappings: by address.
    """

    def __init__(
        self,
        memory: int = 1 << 30,
        granularity: int = 64 << 10,
        partial_maps: bool = False,
        joint_unmap: bool = False,
        wsl: bool = False,
        **context,
    ):
        super().__init__(**context)
        self.total, self.granularity = memory, granularity
        self.partial_maps, self.joint_unmap, self.wsl = partial_maps, joint_unmap, wsl
        self.handles: dict[int, _Physical] = {}
        self.reservations: dict[int, int] = {}
        self.mappings: dict[int, SimpleNamespace] = {}
        self._next = 1
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mmap.restype = ctypes.c_void_p
        self._libc.mmap.argtypes = [
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_long,
        ]
        self._libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self._libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    @property
    def used(self) -> int:
        alive = {id(m.memory): m.memory for m in self.mappings.values()}
        alive.update({id(h): h for h in self.handles.values()})
        return sum(memory.size for memory in alive.values())

    def cuMemGetInfo(self):
        return self.error.CUDA_SUCCESS, self.total - self.used, self.total

    def _good(self, prop) -> bool:
        return (
            int(prop.type) == 1
            and int(prop.location.type) == 1
            and 0 <= prop.location.id < self.devices
            and int(prop.requestedHandleTypes) == 0
        )

    def cuMemGetAllocationGranularity(self, prop, option):
        return (
            (self.error.CUDA_SUCCESS, self.granularity)
            if self._good(prop)
            else (self.error.CUDA_ERROR_INVALID_VALUE, 0)
        )

    def cuMemAddressReserve(self, size, alignment, address, flags):
        if error := self._refuse("cuMemAddressReserve", False):
            return error, 0
        if (
            size <= 0
            or size % mmap.PAGESIZE
            or alignment & (alignment - 1)
            or address
            or flags
        ):
            return self.error.CUDA_ERROR_INVALID_VALUE, 0
        align = max(alignment, self.granularity)
        raw = self._mmap(None, size + align, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        start = -(-raw // align) * align
        for begin, end in ((raw, start), (start + size, raw + size + align)):
            if end > begin:
                self._libc.munmap(begin, end - begin)
        self.reservations[start] = size
        return self.error.CUDA_SUCCESS, start

    def cuMemAddressFree(self, address, size):
        if error := self._refuse("cuMemAddressFree", False):
            return (error,)
        if self.reservations.get(address) != size or self._within(address, size):
            return (self.error.CUDA_ERROR_INVALID_VALUE,)
        del self.reservations[address]
        self._libc.munmap(address, size)
        return (self.error.CUDA_SUCCESS,)

    def cuMemCreate(self, size, prop, flags):
        if error := self._refuse("cuMemCreate", False):
            return error, 0
        if size <= 0 or size % self.granularity or flags or not self._good(prop):
            return self.error.CUDA_ERROR_INVALID_VALUE, 0
        if self.used + size > self.total:
            return self.error.CUDA_ERROR_OUT_OF_MEMORY, 0
        memory = _Physical(size)
        memory.rdma = bool(prop.allocFlags.gpuDirectRDMACapable)
        handle, self._next = self._next, self._next + 1
        self.handles[handle] = memory
        return self.error.CUDA_SUCCESS, handle

    def cuMemRelease(self, handle):
        if error := self._refuse("cuMemRelease", False):
            return (error,)
        if self.handles.pop(int(handle), None) is None:
            raise AssertionError("a handle was released twice: undefined behaviour")
        return (self.error.CUDA_SUCCESS,)

    def cuMemMap(self, address, size, offset, handle, flags):
        if error := self._refuse("cuMemMap", False):
            return (error,)
        memory = self.handles.get(int(handle))
        home = next(
            (
                s
                for s, n in self.reservations.items()
                if s <= address and address + size <= s + n
            ),
            None,
        )
        bad = (
            memory is None
            or home is None
            or flags
            or offset
            or size <= 0
            or any(x % self.granularity for x in (address, size, offset))
            or self._within(address, size)
        )
        if bad or size > memory.size or (size != memory.size and not self.partial_maps):
            return (self.error.CUDA_ERROR_INVALID_VALUE,)
        self._mmap(address, size, 0, mmap.MAP_SHARED | 0x10, memory.descriptor)
        self.mappings[address] = SimpleNamespace(
            size=size, offset=offset, memory=memory, access=False
        )
        return (self.error.CUDA_SUCCESS,)

    def cuMemSetAccess(self, address, size, descriptions, count):
        if error := self._refuse("cuMemSetAccess"):
            return (error,)
        whole = self._whole(address, size)
        if (
            not whole
            or count != len(descriptions)
            or any(
                int(d.location.type) != 1 or not 0 <= d.location.id < self.devices
                for d in descriptions
            )
        ):
            return (self.error.CUDA_ERROR_INVALID_VALUE,)
        if self.wsl and any(self.mappings[start].memory.rdma for start in whole):
            return (self.error.CUDA_ERROR_UNKNOWN,)  # pytorch #192330
        self._libc.mprotect(address, size, mmap.PROT_READ | mmap.PROT_WRITE)
        for start in whole:
            self.mappings[start].access = True
        return (self.error.CUDA_SUCCESS,)

    def cuMemUnmap(self, address, size):
        if error := self._refuse("cuMemUnmap", False):
            return (error,)
        if self.running:
            raise AssertionError(
                "unmapped while a kernel may still use it: illegal memory access"
            )
        whole = self._whole(address, size)
        if not whole or (len(whole) > 1 and not self.joint_unmap):
            return (self.error.CUDA_ERROR_INVALID_VALUE,)
        self._mmap(address, size, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10)
        for start in whole:
            del self.mappings[start]
        return (self.error.CUDA_SUCCESS,)

    def _within(self, address, size):
        return [
            s
            for s, m in self.mappings.items()
            if s < address + size and address < s + m.size
        ]

    def _whole(self, address, size):
        """The mappings that make up the range exactly, else nothing."""
        inside = sorted(self._within(address, size))
        position = address
        for start in inside:
            if start != position:
                return []
            position += self.mappings[start].size
        return inside if position == address + size else []

    def _mmap(self, address, size, protection, flags, descriptor=-1):
        result = self._libc.mmap(address, size, protection, flags, descriptor, 0)
        assert result != ctypes.c_void_p(-1).value, os.strerror(ctypes.get_errno())
        return result


class _Physical:
    rdma = False

    def __init__(self, size: int):
        self.size = size
        self.descriptor = os.memfd_create("fake-gpu")
        os.ftruncate(self.descriptor, size)

    def __del__(self):
        os.close(self.descriptor)
