# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Tensors of E rows whose first rows are one memory that all tensors of a role share.

    layer 0   | staged rows, shared      | slots, its own |
    layer 1   | the same memory          | slots, its own |
    mapped    | handle | handle | ... | h | private handle |

Only whole pages can be shared: the page in which the staged rows end is private. That
is right because nothing that one tensor writes to a staged row is ever read through
another.
"""

import errno
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from typing import Any

import torch

from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError
from vllm.model_executor.layers.fused_moe.expert_slots.weights.driver import (
    Driver,
    DriverError,
)
from vllm.model_executor.layers.fused_moe.expert_slots.weights.host_pages import (
    MAP_FIXED,
    HostPages,
    map_memory,
    pages_of,
    tensor_over,
    unmap_memory,
)

_HANDLES = 16
"""The most handles that one need adds to a role's staging: enough that another need
finds most of its bytes in whole handles, and few to map."""

_WITHOUT = "serve without --moe-gpu-prefetch"


def split(count: int, staged: int, row_bytes: int, page: int) -> tuple[int, int]:
    """Bytes of the shared and of the private part of a tensor of `count` rows."""
    assert 0 <= staged < count and row_bytes > 0, (count, staged, row_bytes)
    shared = staged * row_bytes // page * page
    return shared, -(-count * row_bytes // page) * page - shared


def fit(sizes: Sequence[int], shared: int, page: int) -> tuple[list[int], list[int]]:
    """The handles that make up `shared` bytes of a role's staging: which of those that
    there are, each whole, and the sizes of those still to be made. Equal needs use
    equal handles."""
    taken = []
    for index, size in enumerate(sizes):
        if size <= shared:
            taken.append(index)
            shared -= size
    usual = -(-shared // (_HANDLES * page)) * page
    size = max(usual, sizes[0] if sizes else page)
    whole, rest = divmod(shared, size)
    return taken, [size] * whole + [rest] * (rest > 0)


def committed_bytes(
    tensors: Iterable[tuple[Hashable, int, int, int]], page: int
) -> int:
    """Bytes that tensors of (role, rows, staged rows, bytes of a row), made in this
    order, take."""
    staging: dict[Hashable, list[int]] = {}
    total = 0
    for role, count, staged, row_bytes in tensors:
        shared, private = split(count, staged, row_bytes, page)
        if not shared:
            total += count * row_bytes
            continue
        sizes = staging.setdefault(role, [])
        sizes += fit(sizes, shared, page)[1]
        total += private
    return total + sum(map(sum, staging.values()))


_garbage: list[tuple[Callable[[], bool], Callable[[], object]]] = []
"""Who says whether to wait, and what frees. Not a memory's own: a dead engine's may
have to wait for a capture of the next."""


def _discard(must_wait: Callable[[], bool], free: Callable[[], object]) -> None:
    _garbage.append((must_wait, free))
    _sweep()


def _sweep() -> None:
    later = []
    try:
        while _garbage:
            try:
                must_wait, free = _garbage.pop()
            except (
                IndexError
            ):  # a finaliser ran this in the midst of it, and popped the last
                break
            if must_wait():
                later.append((must_wait, free))
            else:
                free()
    finally:
        _garbage.extend(later)


class Rows:
    """One tensor's memory. It lives as long as something refers to this object; a
    tensor does."""

    def __init__(self, address: int, size: int):
        self.address, self.size = address, size


class Memory:
    """Where a worker's tensors of experts lie.

    Staging belongs to this object and to the tensors that map it, whoever lives longer.

    Attributes:
        page: the unit of mapping in bytes.
        torch_device: where the tensors are.
        close: makes no more tensors; what there is lives on. Its death does the same.
    """

    page: int
    torch_device: torch.device

    def __init__(self, drop: Callable[[Any], object], must_wait: Callable[[], bool]):
        self._drop, self._must_wait = drop, must_wait
        self._staging: dict[Hashable, list[tuple[int, Any]]] = {}
        self._private: dict[int, int] = {}  # by address
        self.close = weakref.finalize(
            self, _discard, must_wait, partial(_release, self._staging, drop)
        )
        self.close.atexit = False

    @property
    def staging(self) -> int:
        """Bytes that all tensors share."""
        return sum(size for pool in self._staging.values() for size, _ in pool)

    @property
    def committed(self) -> int:
        """Bytes of physical memory that were mapped; those of plain tensors are not
        among them."""
        return self.staging + sum(self._private.copy().values())

    def tensor(
        self, role: Hashable, shape: Sequence[int], dtype: torch.dtype, staged: int
    ) -> torch.Tensor:
        """A tensor whose first `staged` rows are shared with every tensor of this role
        as far as whole pages go. Tensors in use together (w13 and w2) differ in
        role."""
        row_bytes = torch.Size(shape[1:]).numel() * dtype.itemsize
        if not split(shape[0], staged, row_bytes, self.page)[0]:
            return torch.zeros(*shape, dtype=dtype, device=self.torch_device)
        rows = self.rows(role, shape[0], staged, row_bytes)
        return tensor_over(rows, dtype, shape, self.torch_device)

    def rows(self, role: Hashable, count: int, staged: int, row_bytes: int) -> Rows:
        """The memory of one tensor.

        Raises:
            MoEPrefetchError: there is not enough; nothing is left behind.
        """
        assert self.close.alive
        self.sweep()
        shared, private = split(count, staged, row_bytes, self.page)
        pool = self._staging.setdefault(role, [])
        taken, sizes = fit([size for size, _ in pool], shared, self.page)
        new: list[tuple[int, Any]] = []
        try:
            for size in sizes:
                new.append((size, self._create(size)))
            handles = [*(pool[index] for index in taken), *new]
            address = self._map(handles, private)
        except BaseException:
            for _, handle in new:
                self._drop(handle)
            raise
        pool += new
        self._private[address] = private
        rows = Rows(address, count * row_bytes)
        free = partial(self._free, address, [*(size for size, _ in handles), private])
        # At the end of the process the driver may be gone; the end frees it.
        weakref.finalize(rows, _discard, self._must_wait, free).atexit = False
        return rows

    def _free(self, address: int, sizes: list[int]) -> None:
        self._unmap(address, sizes)
        del self._private[address]

    def sweep(self) -> None:
        """Frees what nobody refers to any more, of this memory and of earlier ones. Not
        while a graph is being captured, which it would spoil: then the next sweep
        does."""
        _sweep()

    def pin(self, tensor: torch.Tensor, read_only: bool = False) -> int:
        """Keeps a host tensor where kernels can read and write it, as long as its
        memory lives.

        Args:
            tensor: at the start of pages of its own. It may be pinned already.
            read_only: from now on, a write by the host ends the process.

        Returns:
            The address by which kernels reach it.
        """
        raise NotImplementedError

    def _create(self, size: int) -> Any:
        raise NotImplementedError

    def _map(self, shared: list[tuple[int, Any]], private: int) -> int:
        """Maps the handles of `shared` (size, handle), then `private` bytes of new
        memory."""
        raise NotImplementedError

    def _unmap(self, address: int, sizes: list[int]) -> None:
        raise NotImplementedError


def _release(
    staging: dict[Hashable, list[tuple[int, Any]]], drop: Callable[[Any], object]
) -> None:
    while staging:
        for _, handle in staging.popitem()[1]:
            drop(handle)


class HostMemory(Memory):
    """Tensors in host memory: the same layout on the CPU."""

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


_MFD_NOEXEC_SEAL = 8
"""Required where the administrator set vm.memfd_noexec=2; unknown to kernels before
6.3."""


def _memory_file() -> int:
    try:
        return os.memfd_create("expert-staging", os.MFD_CLOEXEC | _MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.memfd_create("expert-staging", os.MFD_CLOEXEC)


class DeviceMemory(Memory):
    """Tensors on a GPU, by the driver's virtual memory management.

    Args:
        driver: CUDA's.
        device: the ordinal; its context must be current on this thread.
        capturing: whether this thread is capturing a graph.
        reclaim: gives memory back that is cached by others; the driver cannot use it
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
            # A capture is spoilt from any thread, and only the one that captures knows
            # of it.
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
        # No export, no compression, no RDMA (which breaks WSL2): the fields' zeroes.
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
                f"GPU {device} cannot map memory ({error.call}: {error.error}), as is "
                "the case on a fractional vGPU such as A40-48C, and expert slots "
                f"need it. Use a whole GPU, or {_WITHOUT}."
            ) from None
        self.page = int(granularity)

    def tensor(
        self, role: Hashable, shape: Sequence[int], dtype: torch.dtype, staged: int
    ) -> torch.Tensor:
        # The driver's memory holds anything, and padding may be computed on rows that
        # nothing was loaded into: zeroes give finite values, which stay in the row.
        return super().tensor(role, shape, dtype, staged).zero_()

    def pin(self, tensor: torch.Tensor, read_only: bool = False) -> int:
        pages = pages_of(tensor)
        assert pages is not None, "only a tensor on pages of its own can be pinned"
        if pages.address not in self._pinned:
            self.sweep()
            self._register(pages)
        # Not before: read-only pages are refused without a flag that discrete cards
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
            pages.free_by(_discard, self._must_wait, unpin)
            # It is the host's address on most machines, but not on all.
            pointer = self._driver.call("cuMemHostGetDevicePointer", pages.address, 0)
        except DriverError as error:
            raise _not_pinned(pages.size, error) from None
        self._pinned[pages.address] = int(pointer)

    def _unpin(self, address: int, size: int) -> None:
        self._pinned.pop(address, None)
        self._when_idle(lambda: self._driver.call("cuMemHostUnregister", address))
        # Not if that failed: the address would come again, still registered.
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
                f"({error.call}: {error.error}). Serve with fewer slots, or free "
                "memory of the GPU.",
            ) from None

    def _map(self, shared: list[tuple[int, Any]], private: int) -> int:
        call = self._driver.call
        total = sum(size for size, _ in shared) + private
        address = int(call("cuMemAddressReserve", total, self.page, 0, 0))
        own, mapped, end = None, [], address
        try:
            own = self._create(private)
            for size, handle in [*shared, (private, own)]:
                # A handle is mapped whole: the driver takes no offset but 0.
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
            if own is not None:  # the mapping keeps the memory
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
        """Does `work` when no kernel can use the memory any more, on whatever thread
        this is: any may be the one that collects garbage."""
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
        "Another library of this process has registered this memory, or expert slots "
        "have a bug: report it"
    ),
    "CUDA_ERROR_NOT_SUPPORTED": (
        "This platform cannot map host memory for its GPU: use another"
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
