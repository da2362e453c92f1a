# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Records what a step does on the device, and does it again without running our Python:
what a CUDA graph does. Anything that the host reads of a device value while recording
fails the test."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from triton.runtime.interpreter import InterpretedFunction

from tests.support import cuda_library
from vllm import _custom_ops as ops

_HOST_READS = (
    "item",
    "tolist",
    "numpy",
    "cpu",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
)
_NO_LAUNCH = {
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "detach",
    "alias",
    "set_",
}
"""Operations that reserve memory or look at it otherwise, besides views."""


class Recorder(TorchDispatchMode):
    """Attributes:
    launches: what a GPU would launch, by name, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[str] = []
        self._steps: list[Callable[[], object]] = []
        self._inside = False

    def unit(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """`work` as one launch: what it does within is the device's."""

        def launch(*args: Any, **kwargs: Any) -> None:
            self.launches.append(name)
            self._steps.append(lambda: work(*args, **kwargs))
            self._inside = True
            try:
                with torch.utils._python_dispatch._disable_current_modes():
                    work(*args, **kwargs)
            finally:
                self._inside = False

        return launch

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero"), f"the host reads {name}"
        if name in _NO_LAUNCH or func.is_view or name == "view":
            return result
        self.launches.append(name)
        outputs = [x for x in tree_flatten(result)[0] if isinstance(x, torch.Tensor)]
        inputs = {
            id(x)
            for x in tree_flatten((args, kwargs))[0]
            if isinstance(x, torch.Tensor)
        }

        def again() -> None:
            fresh = tree_flatten(func(*args, **kwargs))[0]
            for old, new in zip(outputs, fresh, strict=True):
                if id(old) not in inputs:
                    old.copy_(new)

        self._steps.append(again)
        return result

    @contextmanager
    def recording(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Within, everything that this thread does on the device is recorded."""
        run = InterpretedFunction.__getitem__

        def launcher(function: InterpretedFunction, grid: Any) -> Callable[..., Any]:
            return self.unit(function.fn.__name__, run(function, grid))

        with monkeypatch.context() as patch, self:
            patch.setattr(InterpretedFunction, "__getitem__", launcher)
            for name in ("align", "moe_sum"):
                real = {"align": "moe_align_block_size"}.get(name, name)
                patch.setattr(ops, real, self.unit(name, getattr(cuda_library, name)))
            patch.setattr(
                "vllm.model_executor.layers.fused_moe.modular_kernel.apply_moe_activation",
                self.unit("activate", cuda_library.activate),
            )
            for name in _HOST_READS:
                patch.setattr(
                    torch.Tensor, name, self._guarded(name, getattr(torch.Tensor, name))
                )
            yield

    def _guarded(self, name: str, read: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            assert self._inside, f"the host reads a device value by Tensor.{name}"
            return read(*args, **kwargs)

        return guarded

    def replay(self) -> None:
        """Everything again, in order, on what is in the same memory now."""
        for step in self._steps:
            step()
