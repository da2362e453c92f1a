# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Memory of expert tensors on a GPU, by the driver's virtual memory management, and
host memory pinned for its kernels."""

import threading
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch

from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.driver import (
    Driver,
    DriverError,
)
from vllm.model_executor.layers.fused_moe.expert_slots.weights.garbage import discard
from vllm.model_executor.layers.fused_moe.expert_slots.weights.host_pages import (
    HostPages,
    pages_of,
    unmap_memory,
)
from vllm.model_executor.layers.fused_moe.expert_slots.weights.memory import Memory

_WITHOUT = "serve without --moe-gpu-prefetch"


class DeviceMemory(Memory):
    """Tensors on a GPU.

    Args:
        driver: CUDA's.
        device: the ordinal. Its context must be current on this thread.
        capturing: says whether this thread is capturing a graph.
        reclaim: returns cached memory of others to the driver, which cannot use it
            otherwise.

    Raises:
        MoEPrefetchError: the device cannot map memory.
    """

    def __init__(
        self,
        driver: Driver,
        device: int,
        capturing: Callable[[], bool],
        reclaim: Callable[[], object],
    ):
        owner = threading.current_thread()

        def must_wait() -> bool:
            # Any thread can spoil a capture, but only the thread that captures can
            # tell that there is one.
            elsewhere = threading.current_thread() is not owner and owner.is_alive()
            return elsewhere or capturing()

        super().__init__(partial(driver.call, "cuMemRelease"), must_wait)
        self._driver, self._reclaim = driver, reclaim
        self._pinned: dict[int, int] = {}  # by host address, how kernels reach it
        self.torch_device = torch.device("cuda", device)
        self._context = driver.call("cuCtxGetCurrent")
        if not int(self._context) or int(driver.call("cuCtxGetDevice")) != device:
            raise MoEPrefetchError(
                f"GPU {device} has no current context on this thread: call "
                f"torch.cuda.set_device({device}) first."
            )
        cuda = driver.module
        attributes = cuda.CUdevice_attribute
        supported = attributes.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
        if not driver.call(
            "cuDeviceGetAttribute", supported, driver.call("cuDeviceGet", device)
        ):
            raise MoEPrefetchError(
                f"GPU {device} has no virtual memory management (CUDA's attribute is "
                f"0), which expert slots need. Use another GPU, or {_WITHOUT}."
            )
        # Fields that stay zero: no export, no compression, and no RDMA, which WSL2 does
        # not have.
        self._properties, self._access = (
            cuda.CUmemAllocationProp(),
            cuda.CUmemAccessDesc(),
        )
        self._properties.type = cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._access.flags = cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        for location in (self._properties.location, self._access.location):
            location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
            location.id = device
        minimum = cuda.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        try:
            granularity = driver.call(
                "cuMemGetAllocationGranularity", self._properties, minimum
            )
        except DriverError as error:
            if error.error != "CUDA_ERROR_NOT_SUPPORTED":
                raise
            raise MoEPrefetchError(
                f"GPU {device} cannot map memory ({error.call}: {error.error}), which "
                "expert slots need. A fractional vGPU such as A40-48C cannot. Use a "
                f"whole GPU, or {_WITHOUT}."
            ) from None
        self.page = int(granularity)

    def tensor(
        self, role: Hashable, shape: Sequence[int], dtype: torch.dtype, staged: int
    ) -> torch.Tensor:
        # New memory holds any values, and padding may be computed on rows into which
        # nothing was loaded. Zeroes keep those results finite.
        return super().tensor(role, shape, dtype, staged).zero_()

    def pin(self, tensor: torch.Tensor, read_only: bool = False) -> int:
        pages = pages_of(tensor)
        assert pages is not None, "only a tensor on pages of its own can be pinned"
        if pages.address not in self._pinned:
            self.sweep()
            self._register(pages)
        # Protected last: to register read-only pages takes a flag that discrete GPUs
        # refuse.
        if read_only:
            pages.protect()
        return self._pinned[pages.address]

    def _register(self, pages: HostPages) -> None:
        cuda = self._driver.module
        flags = cuda.CU_MEMHOSTREGISTER_PORTABLE | cuda.CU_MEMHOSTREGISTER_DEVICEMAP
        try:
            self._driver.call("cuMemHostRegister", pages.address, pages.size, flags)
            unpin = partial(self._unpin, pages.address, pages.size)
            pages.free_by(discard, self._must_wait, unpin)
            # On most machines, but not on all, this is the host's address.
            pointer = self._driver.call("cuMemHostGetDevicePointer", pages.address, 0)
        except DriverError as error:
            raise _not_pinned(pages.size, error) from None
        self._pinned[pages.address] = int(pointer)

    def _unpin(self, address: int, size: int) -> None:
        self._pinned.pop(address, None)
        self._when_idle(lambda: self._driver.call("cuMemHostUnregister", address))
        # Not reached if that failed: a new mapping at this address would seem to be
        # registered.
        unmap_memory(address, size)

    def _create(self, size: int) -> Any:
        try:
            return self._driver.call("cuMemCreate", size, self._properties, 0)
        except DriverError as error:
            if error.error != "CUDA_ERROR_OUT_OF_MEMORY":
                raise
        self._reclaim()
        try:
            return self._driver.call("cuMemCreate", size, self._properties, 0)
        except DriverError as error:
            raise DriverError(
                error.call,
                error.error,
                f"{self.torch_device} has no {size:,} bytes left for experts "
                f"({error.call}: {error.error}). Serve with fewer slots, or free GPU "
                "memory.",
            ) from None

    def _map(self, shared: list[tuple[int, Any]], private: int) -> int:
        call = self._driver.call
        total = sum(size for size, _ in shared) + private
        address = int(call("cuMemAddressReserve", total, self.page, 0, 0))
        own, mapped, end = None, [], address
        try:
            own = self._create(private)
            for size, handle in [*shared, (private, own)]:
                # The driver maps whole handles only, at offset 0.
                call("cuMemMap", end, size, 0, handle, 0)
                mapped.append((end, size))
                end += size
            call("cuMemSetAccess", address, total, [self._access], 1)
        except BaseException:
            for piece in mapped:
                call("cuMemUnmap", *piece)
            call("cuMemAddressFree", address, total)
            raise
        finally:
            if own is not None:  # the mapping keeps the memory alive
                call("cuMemRelease", own)
        return address

    def _unmap(self, address: int, sizes: list[int]) -> None:
        def unmap() -> None:
            end = address
            for size in sizes:
                self._driver.call("cuMemUnmap", end, size)
                end += size
            self._driver.call("cuMemAddressFree", address, sum(sizes))

        self._when_idle(unmap)

    def _when_idle(self, work: Callable[[], object]) -> None:
        """Does `work` once no kernel can use the memory any more. Any thread may
        collect garbage, so the context is made current here."""
        self._driver.call("cuCtxPushCurrent", self._context)
        try:
            self._driver.call("cuCtxSynchronize")
            work()
        finally:
            self._driver.call("cuCtxPopCurrent")


_NO_ROOM = "Raise the limit of locked memory (ulimit -l), free host memory"
_ADVICE = {
    "CUDA_ERROR_OUT_OF_MEMORY": _NO_ROOM,
    "CUDA_ERROR_OPERATING_SYSTEM": _NO_ROOM,
    "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED": (
        "Another library in this process has registered this memory, or expert slots "
        "have a bug: report it"
    ),
    "CUDA_ERROR_NOT_SUPPORTED": (
        "This platform cannot map host memory for its GPU: use another machine"
    ),
}


def _not_pinned(size: int, error: DriverError) -> DriverError:
    advice = _ADVICE.get(error.error, "Look up what this error means here")
    return DriverError(
        error.call,
        error.error,
        f"the driver could not pin {size:,} bytes of host memory ({error.call}: "
        f"{error.error}). {advice}, or {_WITHOUT}.",
    )
