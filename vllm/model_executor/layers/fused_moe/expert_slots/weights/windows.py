# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Reads safetensors files in windows, so that loading never holds a whole file beside
the host store.

An open safetensors file is mapped whole. Each page that was read counts as memory of
this process until the file is closed, so a checkpoint in one file would be in memory
twice.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import safe_open
from vllm.model_executor.model_loader import weight_utils

from vllm.model_executor.layers.fused_moe.expert_slots.replacing import replaced

WINDOW_BYTES = 128 << 20
"""Bytes that are read before the file is mapped anew."""


class WindowedSafeOpen:
    """Stands in for `safetensors.safe_open`: closes and opens the file as it is read.
    Tensors that it returned stay valid, each with its mapping."""

    def __init__(self, *args: Any, **kwargs: Any):
        self._arguments = args, kwargs
        self._open()

    def _open(self) -> None:
        args, kwargs = self._arguments
        self._file = safe_open(*args, **kwargs)
        self._read = 0

    def get_tensor(self, name: str) -> torch.Tensor:
        if self._read > WINDOW_BYTES:
            self._open()
        tensor = self._file.get_tensor(name)
        self._read += tensor.nbytes
        return tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "WindowedSafeOpen":
        return self

    def __exit__(self, *exception: Any) -> None:
        del self._file


@contextmanager
def reading_in_windows() -> Iterator[None]:
    """Within, vLLM's loaders read safetensors files in windows."""
    with replaced(weight_utils, "safe_open", WindowedSafeOpen):
        yield
