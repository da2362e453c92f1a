# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A stand-in for `cuda.bindings.driver` that plays the documented rules of virtual
memory management and of registered host memory, on real memory.

Physical memory is a memfd, a mapping is mmap: two mappings of one handle see each
other's bytes, an address without access faults, and memory is counted until the last
mapping *and* the last handle are gone. Enumerations and structures are NVIDIA's own
where the package is installed, so that a wrong name or field fails here.

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
Rules of host memory ("Memory Management", and reports of the drivers 595 and 610):
  register    712 for a range that overlaps a registered one, also if that was unmapped
              meanwhile;
              801 for the flag READ_ONLY (as discrete x86 cards answer); 1 for size 0, a
              device address, memory that is not mapped or that is read-only
  pointer     only with the flag DEVICEMAP; the host's address plus `host_offset`
  unregister  1 for what is not registered; what is unmapped already is a bug of ours
Also: memory for RDMA has no access under WSL2 (pytorch #192330), calls without a
current context, calls that a graph capture forbids, and unmapping or unregistering what
a kernel still uses.
"""

import ctypes
import mmap
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch

from vllm.model_executor.layers.fused_moe.expert_slots.cuda.driver import Driver
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.memory import DeviceMemory

try:
    from cuda.bindings import driver as _real
except ImportError:
    _real = None

_NAMES = {
    "CUresult": {
        "CUDA_SUCCESS": 0,
        "CUDA_ERROR_INVALID_VALUE": 1,
        "CUDA_ERROR_OUT_OF_MEMORY": 2,
        "CUDA_ERROR_INVALID_DEVICE": 101,
        "CUDA_ERROR_INVALID_CONTEXT": 201,
        "CUDA_ERROR_OPERATING_SYSTEM": 304,
        "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED": 712,
        "CUDA_ERROR_NOT_SUPPORTED": 801,
        "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED": 900,
        "CUDA_ERROR_UNKNOWN": 999,
    },
    "CUdevice_attribute": {
        "CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED": 102
    },
    "CUmemAllocationType": {"CU_MEM_ALLOCATION_TYPE_PINNED": 1},
    "CUmemLocationType": {"CU_MEM_LOCATION_TYPE_DEVICE": 1},
    "CUmemAccess_flags": {"CU_MEM_ACCESS_FLAGS_PROT_READWRITE": 3},
    "CUmemAllocationGranularity_flags": {"CU_MEM_ALLOC_GRANULARITY_MINIMUM": 0},
}


class FakeDriver:
    CU_MEMHOSTREGISTER_PORTABLE = 1
    CU_MEMHOSTREGISTER_DEVICEMAP = 2

    def __init__(
        self,
        memory: int = 1 << 30,
        granularity: int = 64 << 10,
        devices: int = 1,
        supported: bool = True,
        partial_maps: bool = False,
        joint_unmap: bool = False,
        wsl: bool = False,
        host_offset: int = 0,
    ):
        self.total, self.granularity, self.devices, self.supported = (
            memory,
            granularity,
            devices,
            supported,
        )
        self.partial_maps, self.joint_unmap, self.wsl = partial_maps, joint_unmap, wsl
        self.context, self.stack = 0xC0, []
        self.capturing = self.running = self.spoilt = False
        self.handles: dict[
            int, SimpleNamespace
        ] = {}  # by value; memory may outlive the handle
        self.reservations: dict[int, int] = {}
        self.mappings: dict[int, SimpleNamespace] = {}  # by address
        self.calls: list[str] = []
        self.host_offset = host_offset
        self.registered: dict[int, SimpleNamespace] = {}
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
        for name, values in _NAMES.items():
            setattr(
                self, name, getattr(_real, name) if _real else SimpleNamespace(**values)
            )
        self.error = self.CUresult

    def _structure(self, name):
        if _real:
            return getattr(_real, name)()
        return SimpleNamespace(
            location=SimpleNamespace(type=0, id=0),
            allocFlags=SimpleNamespace(
                compressionType=0, gpuDirectRDMACapable=0, usage=0
            ),
            requestedHandleTypes=0,
            type=0,
            id=0,
            flags=0,
        )

    def CUmemAllocationProp(self):
        return self._structure("CUmemAllocationProp")

    def CUmemAccessDesc(self):
        return self._structure("CUmemAccessDesc")

    def CUmemLocation(self):
        return self._structure("CUmemLocation")

    # -- what a test looks at --

    @property
    def used(self) -> int:
        alive = {id(m.memory): m.memory for m in self.mappings.values()}
        alive.update({id(h): h for h in self.handles.values()})
        return sum(memory.size for memory in alive.values())

    def memory_of(self, address: int):
        for start, mapping in self.mappings.items():
            if start <= address < start + mapping.size:
                return mapping.memory, mapping.offset + address - start, mapping.access
        return None

    # -- context --

    def _refuse(self, name: str, needs_context: bool = True):
        self.calls.append(name)
        if self.capturing:
            self.spoilt = True  # the capture is lost, as on hardware
            return self.error.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
        if needs_context and not self.context:
            return self.error.CUDA_ERROR_INVALID_CONTEXT
        return None

    def cuCtxGetCurrent(self):
        return self.error.CUDA_SUCCESS, self.context

    def cuCtxGetDevice(self):
        return (
            (self.error.CUDA_SUCCESS, 0)
            if self.context
            else (self.error.CUDA_ERROR_INVALID_CONTEXT, None)
        )

    def cuCtxPushCurrent(self, context):
        self.stack.append(self.context)
        self.context = context
        return (self.error.CUDA_SUCCESS,)

    def cuCtxPopCurrent(self):
        popped, self.context = self.context, self.stack.pop()
        return self.error.CUDA_SUCCESS, popped

    def cuCtxSynchronize(self):
        if error := self._refuse("cuCtxSynchronize"):
            return (error,)
        self.running = False
        return (self.error.CUDA_SUCCESS,)

    def cuDeviceGet(self, ordinal):
        return (
            (self.error.CUDA_SUCCESS, ordinal)
            if ordinal < self.devices
            else (self.error.CUDA_ERROR_INVALID_DEVICE, 0)
        )

    def cuDeviceGetAttribute(self, attribute, device):
        assert int(attribute) == 102
        return self.error.CUDA_SUCCESS, int(self.supported)

    def cuGetErrorName(self, error):
        if _real:
            return self.error.CUDA_SUCCESS, error.name.encode()
        return self.error.CUDA_SUCCESS, next(
            k for k, v in _NAMES["CUresult"].items() if v == error
        ).encode()

    def cuMemGetInfo(self):
        return self.error.CUDA_SUCCESS, self.total - self.used, self.total

    # -- virtual memory management --

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

    # -- registered host memory --

    def cuMemHostRegister(self, address, size, flags):
        if error := self._refuse("cuMemHostRegister"):
            return (error,)
        for start, other in self.registered.items():
            if start < address + size and address < start + other.size:
                return (self.error.CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED,)
        if flags & 8:
            return (self.error.CUDA_ERROR_NOT_SUPPORTED,)
        on_device = any(
            s < address + size and address < s + n for s, n in self.reservations.items()
        )
        if size <= 0 or on_device or not _host_memory(address, size, "rw"):
            return (self.error.CUDA_ERROR_INVALID_VALUE,)
        self.registered[address] = SimpleNamespace(size=size, flags=flags)
        return (self.error.CUDA_SUCCESS,)

    def cuMemHostUnregister(self, address):
        if error := self._refuse("cuMemHostUnregister"):
            return (error,)
        if self.running:
            raise AssertionError("unregistered while a kernel may still use it")
        if address not in self.registered:
            return (self.error.CUDA_ERROR_INVALID_VALUE,)
        size = self.registered.pop(address).size
        assert _host_memory(address, size, "r"), "unregistered after it was unmapped"
        return (self.error.CUDA_SUCCESS,)

    def cuMemHostGetDevicePointer(self, address, flags):
        entry = self.registered.get(address)
        if (
            entry is None
            or flags
            or not entry.flags & self.CU_MEMHOSTREGISTER_DEVICEMAP
        ):
            return self.error.CUDA_ERROR_INVALID_VALUE, 0
        return self.error.CUDA_SUCCESS, address + self.host_offset

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


def _host_memory(address, size, access):
    """Whether this memory is mapped, with this access."""
    maps = Path("/proc/self/maps").read_text()
    for start, end, allowed in re.findall(r"^(\w+)-(\w+) (\S+)", maps, re.M):
        if int(start, 16) <= address < int(end, 16) and allowed.startswith(access):
            size -= int(end, 16) - address
            address = int(end, 16)
    return size <= 0


class _Physical:
    def __init__(self, size: int):
        self.size = size
        self.descriptor = os.memfd_create("fake-gpu")
        os.ftruncate(self.descriptor, size)

    def __del__(self):
        os.close(self.descriptor)


def device_memory(
    driver: FakeDriver, reclaim: Callable[[], object] = lambda: None
) -> DeviceMemory:
    """Memory of the stand-in, which torch takes for the host's: that is what it is."""
    memory = DeviceMemory(Driver(driver), 0, lambda: driver.capturing, reclaim)
    memory.torch_device = torch.device("cpu")
    return memory
