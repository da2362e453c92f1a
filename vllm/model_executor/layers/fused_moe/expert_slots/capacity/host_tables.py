# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Tensors that a model itself keeps in host memory, counted without being made."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_LARGE = 64 << 20
"""Bytes from which a tensor in host memory is counted instead of made, pinned or
not."""


class HostTables(TorchDispatchMode):
    """Within, tensors that are pinned or large and that a model explicitly puts into
    host memory are made on the meta device instead, and remembered. One model's table
    takes 100 GB.

    Attributes:
        num_bytes: their bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0
        self._kept: list[torch.Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if "view_from_cpu_tensor" in str(func):
            return args[0]  # the device's view of such a tensor
        on_host = (
            str(kwargs.get("device")) == "cpu"
            and func is torch.ops.aten.empty.memory_format
        )
        if on_host:
            table = func(
                *args, **{**kwargs, "device": torch.device("meta"), "pin_memory": False}
            )
            if kwargs.get("pin_memory") or table.nbytes >= _LARGE:
                self.num_bytes += table.nbytes
                self._kept.append(table)
                return table
        return func(*args, **kwargs)

    def hold(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` is a counted host table, or a view of one."""
        storages = {table.untyped_storage()._cdata for table in self._kept}
        return tensor.untyped_storage()._cdata in storages
