# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The bytes of an expert after stock has processed it: packed, padded, with other
scales than in the checkpoint; and what the processing takes meanwhile. Stock's own code
processes a few experts of ones."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from vllm import _custom_ops
from vllm.model_executor.layers.fused_moe.expert_slots.replacing import replaced
from vllm.model_executor.layers.fused_moe.expert_slots.weights.bundle import (
    FEW,
    Bundle,
    few_experts,
)
from vllm.model_executor.layers.fused_moe.expert_slots.weights.parts import (
    experts_at_a_time,
)


class Processed(NamedTuple):
    """What stock makes of a layer's experts.

    Attributes:
        rows: names of the per-expert tensors, and the bytes of one expert in each.
        peak_bytes: the most that the processing of a part of the layer's experts holds
            at a time: as they were read, as they become, and what lies between. An
            upper bound: one expert more counts, for what operators hold of the expert
            that they work on, and what stock holds for one expert at a time counts for
            half of the part.
    """

    rows: tuple[tuple[str, int], ...]
    peak_bytes: int


def processed(layer: RoutedExperts, known: dict[Any, Processed]) -> Processed:
    """What the experts of a layer take while and after they are processed.

    Args:
        layer: stock's, with its parameters on the meta device. It is used up.
        known: of layers that were asked for before; is added to. Layers of a model are
            alike.

    Raises:
        MoEPrefetchError: the layer keeps tensors that slots cannot follow.
    """
    method: Any = layer.quant_method
    key = (
        type(method),
        getattr(method, "experts_cls", None),
        tuple(
            (name, p.shape, p.dtype)
            for name, p in layer.named_parameters(recurse=False)
        ),
    )
    if key not in known:
        at_a_time, cpu = experts_at_a_time(layer), torch.device("cpu")
        with cpu, _shapes_alone(), few_experts(layer, cpu):
            with LiveBytes(layer.parameters(recurse=False)) as live:
                method.process_weights_after_loading(layer)
            bundle = Bundle.of(layer, FEW)
        rows = tuple((name, t[0].nbytes) for name, t in bundle.tensors().items())
        known[key] = Processed(rows, live.peak * (at_a_time + 1) // FEW)
    return known[key]


class LiveBytes(TorchDispatchMode):
    """Within, the bytes of tensors that are made are counted until they are freed.

    Args:
        tensors: those that are there at the start. They count, too.

    Attributes:
        peak: the most bytes at a time.
    """

    def __init__(self, tensors: Iterator[torch.Tensor]):
        super().__init__()
        self.peak = self._now = 0
        self._storages: dict[int, weakref.ref[Any]] = {}
        self._count(list(tensors))

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        self._count(tree_leaves(made))
        return made

    def _count(self, values: list[Any]) -> None:
        for value in values:
            if not isinstance(value, torch.Tensor):
                continue
            storage: Any = value.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in self._storages:
                continue

            def freed(_: Any, key: int = key, size: int = size) -> None:
                del self._storages[key]
                self._now -= size

            self._storages[key] = weakref.ref(storage, freed)
            self._now += size
        self.peak = max(self.peak, self._now)


@contextmanager
def _shapes_alone() -> Iterator[None]:
    """Within, vLLM's operators that prepare weights on a GPU give tensors of the right
    shape and of no content: they exist nowhere else."""
    with ExitStack() as stack:
        for name, shaped in _SHAPED.items():
            stack.enter_context(replaced(_custom_ops, name, shaped))
        # Some of stock's methods call it, and there may be no GPU here.
        stack.enter_context(replaced(torch.accelerator, "empty_cache", lambda: None))
        yield


def _repacked(
    b_q_weight: torch.Tensor,
    size_k: int,
    size_n: int,
    num_bits: int,
    *_: Any,
    **__: Any,
) -> torch.Tensor:
    """Marlin's tiles of 16 rows: [..., size_k / 16, size_n * num_bits / 2]."""
    shape = (*b_q_weight.shape[:-2], size_k // 16, size_n * num_bits // 2)
    return torch.empty(shape, dtype=b_q_weight.dtype)


def _scaled_fp8(
    values: torch.Tensor, scale: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(values, dtype=torch.float8_e4m3fn), scale


_SHAPED: dict[str, Any] = {
    "gptq_marlin_repack": _repacked,
    "awq_marlin_repack": _repacked,
    "gptq_marlin_moe_repack": _repacked,
    "awq_marlin_moe_repack": _repacked,
    "scaled_fp8_quant": _scaled_fp8,
}
