# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A stand-in for `cuda.bindings.driver`: virtual memory, and the documented rules of
registered host memory, on real memory.

Rules of host memory ("Memory Management", and reports of the drivers 595 and 610):
  register    712 for a range that overlaps a registered one, also if that was unmapped
              meanwhile;
              801 for the flag READ_ONLY (as discrete x86 cards answer); 1 for size 0, a
              device address, memory that is not mapped or that is read-only
  pointer     only with the flag DEVICEMAP; the host's address plus `host_offset`
  unregister  1 for what is not registered; what is unmapped already is a bug of ours
Also: to unregister what a kernel still uses fails the test.
"""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch

from tests.support.fake_virtual_memory import FakeVirtualMemory
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.driver import Driver
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.memory import DeviceMemory


class FakeDriver(FakeVirtualMemory):
    """The whole stand-in.

    Attributes:
        host_offset: the device's address of registered memory less the host's.
        registered: the size and flags of each range, by address.
    """

    CU_MEMHOSTREGISTER_PORTABLE = 1
    CU_MEMHOSTREGISTER_DEVICEMAP = 2

    def __init__(self, host_offset: int = 0, **device):
        super().__init__(**device)
        self.host_offset = host_offset
        self.registered: dict[int, SimpleNamespace] = {}

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


def _host_memory(address, size, access):
    """Whether this memory is mapped, with this access."""
    maps = Path("/proc/self/maps").read_text()
    for start, end, allowed in re.findall(r"^(\w+)-(\w+) (\S+)", maps, re.M):
        if int(start, 16) <= address < int(end, 16) and allowed.startswith(access):
            size -= int(end, 16) - address
            address = int(end, 16)
    return size <= 0


def device_memory(
    driver: FakeDriver, reclaim: Callable[[], object] = lambda: None
) -> DeviceMemory:
    """Memory of the stand-in, which torch takes for the host's: that is what it is."""
    memory = DeviceMemory(Driver(driver), 0, lambda: driver.capturing, reclaim)
    memory.torch_device = torch.device("cpu")
    return memory
