# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Memory of a simulated launch, and races for it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LANES = 32
SHARED_BASE = 1 << 10
LOCAL_BASE = 1 << 20
LOCAL_BYTES = 256
"""A thread's stack: small, and addressed generically."""
LANE = np.arange(LANES)
ALL = np.ones(LANES, bool)
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
Array = np.ndarray


class SimulationError(AssertionError):
    """The program did what a GPU would not allow."""


class Memory:
    """Buffers at their real addresses, or one at a base of its own."""

    def __init__(self) -> None:
        self._buffers: dict[int, Array] = {}
        self._bases: list[int] = []

    def add(self, data: Array, base: int | None = None) -> None:
        """Makes the bytes of `data` (contiguous) accessible."""
        flat = data.reshape(-1).view(np.uint8)
        base = flat.ctypes.data if base is None else base
        if base not in self._buffers or len(self._buffers[base]) < len(flat):
            self._buffers[base] = flat
            self._bases = sorted(self._buffers)

    def buffers(self) -> list[Array]:
        return list(self._buffers.values())

    def _find(self, low: int, high: int, what: str) -> tuple[int, Array]:
        index = int(np.searchsorted(self._bases, low, side="right")) - 1
        base = self._bases[index] if index >= 0 else 0
        if index < 0 or high > base + len(self._buffers[base]):
            raise SimulationError(f"{what}: {low:#x}...{high:#x} is in no buffer")
        return base, self._buffers[base]

    def _parts(self, address: Array, size: int, what: str):
        """Yields buffer, offsets in it and which of `address` they are."""
        if np.any(address % size):
            raise SimulationError(f"{what}: address not a multiple of {size}")
        low, high = int(address.min()), int(address.max()) + size
        try:
            base, data = self._find(low, high, what)
            yield data, (address - np.uint64(base)).astype(np.int64), slice(None)
        except SimulationError:
            for i, one in enumerate(address.tolist()):
                base, data = self._find(one, one + size, what)
                yield data, np.array([one - base]), slice(i, i + 1)

    def load(self, address: Array, size: int, what: str) -> Array:
        """[lanes] addresses -> [lanes, size] bytes."""
        out = np.empty((len(address), size), np.uint8)
        for data, offset, which in self._parts(address, size, what):
            out[which] = data[offset[:, None] + np.arange(size)]
        return out

    def store(self, address: Array, values: Array, what: str) -> None:
        size = values.shape[1]
        for data, offset, which in self._parts(address, size, what):
            data[offset[:, None] + np.arange(size)] = values[which]


@dataclass
class Access:
    """One memory instruction of some lanes."""

    pc: int
    is_write: bool
    threads: Array  # [lanes]
    address: Array  # [lanes] uint64
    values: Array  # [lanes, size] bytes written or read
    order: int  # of warp-wide synchronisations before it


def conflicts(accesses: Sequence[Access]):
    """Yields the bytes that one thread writes and another touches: per granule
    (address, the indices of its accesses, thread, is_write, value), all unordered."""
    if not any(a.is_write for a in accesses):
        return
    sizes = [a.values.shape[1] for a in accesses]
    granule = min(8, min(sizes))
    address, thread, write, which, value = [], [], [], [], []
    for i, a in enumerate(accesses):
        words = a.values.shape[1] // granule
        at = a.address[:, None] + np.arange(words, dtype=np.uint64) * np.uint64(granule)
        address.append(at.ravel())
        thread.append(np.repeat(a.threads, words))
        write.append(np.full(at.size, a.is_write))
        which.append(np.full(at.size, i))
        value.append(
            np.ascontiguousarray(a.values).view(UNSIGNED[granule]).ravel().astype("u8")
        )
    address, thread, write, which, value = map(
        np.concatenate, (address, thread, write, which, value)
    )
    order = np.argsort(address, kind="stable")
    address, thread, write, which, value = (
        x[order] for x in (address, thread, write, which, value)
    )
    starts = np.flatnonzero(np.r_[True, address[1:] != address[:-1]])
    ends = np.r_[starts[1:], len(address)]
    written = np.logical_or.reduceat(write, starts)
    several = np.minimum.reduceat(thread, starts) != np.maximum.reduceat(thread, starts)
    for group in np.flatnonzero(written & several):
        part = slice(starts[group], ends[group])
        yield address[part.start], which[part], thread[part], write[part], value[part]
