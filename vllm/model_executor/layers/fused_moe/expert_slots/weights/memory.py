# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Where a worker's tensors of experts lie: what the platforms' memories have in common
(`cpu/memory.py`, `cuda/memory.py`)."""

import weakref
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch

from vllm.model_executor.layers.fused_moe.expert_slots.weights.garbage import (
    discard,
    sweep,
)
from vllm.model_executor.layers.fused_moe.expert_slots.weights.host_pages import (
    tensor_over,
)
from vllm.model_executor.layers.fused_moe.expert_slots.weights.layout import fit, split


class Rows:
    """The memory of one tensor. It is freed when nothing refers to this object any
    more; the tensor made of it does.

    Attributes:
        address: of the first byte.
        size: in bytes.
    """

    def __init__(self, address: int, size: int):
        self.address, self.size = address, size


class Memory:
    """Tensors whose staging rows are shared (`layout.py`).

    Staging is freed when neither this object nor a tensor that maps it is left.

    Args:
        drop: frees a handle that `_create` made.
        must_wait: whether freeing must wait, as during the capture of a graph.

    Attributes:
        page: the unit of mapping in bytes.
        torch_device: where the tensors are.
        close: ends the making of tensors; those that exist stay. The end of this object
            does the same.
    """

    page: int
    torch_device: torch.device

    def __init__(self, drop: Callable[[Any], object], must_wait: Callable[[], bool]):
        self._drop, self._must_wait = drop, must_wait
        self._staging: dict[Hashable, list[tuple[int, Any]]] = {}
        self._private: dict[int, int] = {}  # by address
        self.close = weakref.finalize(
            self, discard, must_wait, partial(_release, self._staging, drop)
        )
        self.close.atexit = False

    @property
    def staging(self) -> int:
        """Bytes that all tensors share."""
        return sum(size for pool in self._staging.values() for size, _ in pool)

    @property
    def committed(self) -> int:
        """Bytes of physical memory that are mapped, without those of plain tensors."""
        return self.staging + sum(self._private.copy().values())

    def tensor(
        self, role: Hashable, shape: Sequence[int], dtype: torch.dtype, staged: int
    ) -> torch.Tensor:
        """A tensor that shares its staging rows, as far as whole pages go, with every
        tensor of its role.

        Args:
            role: tensors that are in use together, such as w13 and w2, differ in it.
            shape: [rows, ...].
            dtype: of the tensor.
            staged: how many of the rows, the first ones, are staging rows.

        Returns:
            The tensor, on `torch_device`. It is a plain tensor of torch's if there is
            no whole page to share.
        """
        row_bytes = torch.Size(shape[1:]).numel() * dtype.itemsize
        if not split(shape[0], staged, row_bytes, self.page)[0]:
            return torch.zeros(*shape, dtype=dtype, device=self.torch_device)
        rows = self.rows(role, shape[0], staged, row_bytes)
        return tensor_over(rows, dtype, shape, self.torch_device)

    def rows(self, role: Hashable, count: int, staged: int, row_bytes: int) -> Rows:
        """The memory of one tensor. Takes what `split` takes, and the role.

        Raises:
            MoEPrefetchError: the memory does not suffice; what was made until then is
                freed.
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
        # Not at the end of the process, which frees the memory: the driver may be gone.
        weakref.finalize(rows, discard, self._must_wait, free).atexit = False
        return rows

    def _free(self, address: int, sizes: list[int]) -> None:
        self._unmap(address, sizes)
        del self._private[address]

    def sweep(self) -> None:
        """Frees what is no longer referred to, of this memory and of earlier ones.
        While a graph is captured nothing is freed, because that would spoil the graph;
        the next sweep does it."""
        sweep()

    def pin(self, tensor: torch.Tensor, read_only: bool = False) -> int:
        """Lets kernels read and write a host tensor until its memory is freed.

        Args:
            tensor: at the start of pages of its own. It may be pinned already.
            read_only: whether a write by the host ends the process from now on.

        Returns:
            The address by which kernels reach the tensor.
        """
        raise NotImplementedError

    def _create(self, size: int) -> Any:
        """A handle for `size` bytes of new memory."""
        raise NotImplementedError

    def _map(self, shared: list[tuple[int, Any]], private: int) -> int:
        """Maps the handles of `shared`, each (size, handle), and behind them `private`
        bytes of new memory. Returns the address of the first byte."""
        raise NotImplementedError

    def _unmap(self, address: int, sizes: list[int]) -> None:
        """Undoes `_map`. `sizes` are those of the handles and of the private part."""
        raise NotImplementedError


def _release(
    staging: dict[Hashable, list[tuple[int, Any]]], drop: Callable[[Any], object]
) -> None:
    while staging:
        for _, handle in staging.popitem()[1]:
            drop(handle)
