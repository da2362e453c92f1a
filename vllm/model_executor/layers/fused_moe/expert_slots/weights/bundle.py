# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which tensors of a layer hold its experts.

Stock's processing replaces, adds and removes tensors, and each format does so in its
own way. So the tensors are found by a rule, after the processing, wherever stock keeps
them: on the layer, its method, the quantisation config, the kernel. A tensor with a row
for each expert belongs to the experts. A single value, expanded or not, is the same for
all experts. Anything else that is not known stops the start.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError
from vllm.model_executor.layers.fused_moe.expert_slots.replacing import replaced

_OF_THE_ROUTER = {
    "_expert_map",
    "e_score_correction_bias",
    "expert_global_to_physical",
    "expert_local_to_global",
    "expert_mask",
    "expert_physical_to_global",
    "hash_indices_table",
}
"""Tensors that may have a row for each expert, and are read by expert id."""

_NOT_READ = {"w13_weight_shape", "w2_weight_shape"}
"""Tensors of compressed-tensors checkpoints that no kernel reads."""

_SCRATCH = {"workspace"}
"""Memory that a kernel writes before it reads it."""

_LEFT_OUT = _OF_THE_ROUTER | _NOT_READ | _SCRATCH

_USED_UP = {
    f"{matrix}_{what}_global_scale"
    for matrix in ("w13", "w2")
    for what in ("weight", "input")
}
"""Scales of compressed-tensors NVFP4, from which processing makes others. A kernel that
reads them all the same has them in its quantisation config."""

WEIGHTS = ("_weight", "_weight_packed", "_qweight")
"""Ends of the names of the parameters that hold weights, as they are loaded."""

_BEFORE_PROCESSING = {
    *("w13_input_scale", "w2_input_scale"),
    *("w13_input_global_scale", "w2_input_global_scale"),
}
"""Activation scales. A checkpoint has one for each expert, and processing leaves their
maximum."""

_SCALES_OF_ALL = {"w13_weight_scale_2", "w2_weight_scale_2"} | _USED_UP
"""NVFP4's scales of scales: in bfloat16 processing scales all experts of a layer by one
factor."""

FEW = 2
"""Experts of a layer whose processing is tried (`few_experts`). With one expert, a
tensor of one value could be either."""


@dataclass(frozen=True)
class Bundle:
    """The tensors of a layer that has been processed.

    Attributes:
        experts: name -> the tensor objects [E, ...] that share one memory. The name is
            the parameter's, or the path of a tensor that is none.
        layer_wide: the same of single values that hold for all experts.
    """

    experts: dict[str, list[torch.Tensor]]
    layer_wide: dict[str, list[torch.Tensor]]

    @classmethod
    def of(cls, layer: Any, num_experts: int) -> "Bundle":
        """Finds the tensors of a layer.

        Args:
            layer: a `RoutedExperts`, processed.
            num_experts: rows that its per-expert tensors have.

        Raises:
            MoEPrefetchError: a tensor cannot be placed, or the kernel's weights are not
                among the tensors that were found.
        """
        bundle = cls({}, {})
        known: dict[int, tuple[Any, list[torch.Tensor]]] = {}
        for path, tensor in _tensors_of(layer):
            if not tensor.numel() or path.rpartition(".")[2] in _LEFT_OUT | _USED_UP:
                continue
            layout = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            storage = tensor.untyped_storage().data_ptr()
            if storage in known:
                first, places = known[storage]
                if first != layout:
                    raise _refused(layer, path, tensor, "is a view of another tensor")
                places.append(tensor)
                continue
            places = [tensor]
            known[storage] = layout, places
            expanded = tensor.dim() == 1 and not tensor.stride(0)
            if expanded or tensor.numel() == 1:
                bundle.layer_wide[path] = places
            elif tensor.shape[0] != num_experts:
                raise _refused(layer, path, tensor, "has no row for each expert")
            elif not tensor.is_contiguous():
                raise _refused(layer, path, tensor, "is not contiguous")
            else:
                bundle.experts[path] = places
        found = {id(tensor) for places in bundle.experts.values() for tensor in places}
        for name in ("w13_weight", "w2_weight"):
            if id(getattr(layer, name, None)) not in found:
                raise MoEPrefetchError(
                    f"{layer.layer_name}: the kernel reads {name}, which is no tensor "
                    "with a row for each expert after "
                    f"{type(layer.quant_method).__name__} has processed it, so expert "
                    "slots cannot follow it. Serve without --moe-gpu-prefetch."
                )
        return bundle

    def tensors(self) -> dict[str, torch.Tensor]:
        """One tensor [E, ...] of each name, without gradients."""
        return {name: places[0].data for name, places in self.experts.items()}

    def values(self) -> dict[str, torch.Tensor]:
        """The layer-wide values, one element each."""
        return {
            name: places[0].data.reshape(-1)[:1]
            for name, places in self.layer_wide.items()
        }

    def set_values(self, values: dict[str, torch.Tensor], num_experts: int) -> None:
        """Replaces the layer-wide values, wherever they are kept.

        Args:
            values: of each name, [1].
            num_experts: to which expanded values are expanded.
        """
        _become(
            self.layer_wide,
            {
                name: values[name].expand(num_experts)
                if places[0].numel() > 1
                else values[name].view(places[0].shape)
                for name, places in self.layer_wide.items()
            },
        )

    def set_rows(self, layer: Any, rows: dict[str, torch.Tensor]) -> None:
        """Replaces the experts by rows, wherever they are kept: kernels and the
        quantisation config refer to the same tensor objects.

        Args:
            layer: the one that this bundle was found in.
            rows: name -> [E, ...].

        Raises:
            MoEPrefetchError: something else still holds values of each expert. A kernel
                would read it by row number.
        """
        _become(self.experts, rows)
        here = {tensor.data_ptr() for tensor in rows.values()}
        again = Bundle.of(layer, layer.local_num_experts)
        for path, (tensor, *_) in again.experts.items():
            if tensor.data_ptr() not in here:
                raise _refused(layer, path, tensor, "was not moved to the slots")


def kinds_of_rows(
    tensors: dict[str, torch.Tensor],
) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and type of an expert's row in each of the tensors [E, ...]."""
    return {name: (t.shape[1:], t.dtype) for name, t in tensors.items()}


def parameters_of_experts(layer: Any) -> dict[str, torch.nn.Parameter]:
    """The parameters of a layer that has not been processed which hold its experts:
    [E, ...] each. Of several names of a parameter the first one."""
    return {
        name: parameter
        for name, parameter in layer.named_parameters(recurse=False)
        if parameter.dim() > 0
        and parameter.shape[0] == layer.local_num_experts
        and name not in _LEFT_OUT | _BEFORE_PROCESSING
    }


def made_alone(layer: Any) -> bool:
    """Whether stock's processing makes the rows of an expert, and what holds for all
    experts, without looking at the others. Of a layer that has not been processed."""
    names = {name for name, _ in layer.named_parameters(recurse=False)}
    return names.isdisjoint(_BEFORE_PROCESSING | _SCALES_OF_ALL)


def few_experts(layer: Any, device: torch.device) -> AbstractContextManager[None]:
    """Within, stock's processing sees a layer of `FEW` experts on `device`, with ones
    for weights. What it makes has the rows, and the kernel, of the whole layer."""

    def ones(rows: torch.Tensor, of_experts: bool) -> torch.Tensor:
        shape = (FEW, *rows.shape[1:]) if of_experts else rows.shape
        return torch.ones(shape, dtype=rows.dtype, device=device)

    return _seen_with(layer, FEW, ones)


def chosen_experts(
    layer: Any, device: torch.device, chosen: range
) -> AbstractContextManager[None]:
    """Within, stock's processing sees a layer of the `chosen` experts, copied to
    `device`."""

    def copied(rows: torch.Tensor, of_experts: bool) -> torch.Tensor:
        rows = rows[chosen.start : chosen.stop] if of_experts else rows
        return rows.to(device, copy=True)

    return _seen_with(layer, len(chosen), copied)


@contextmanager
def _seen_with(
    layer: Any, count: int, values: Callable[[torch.Tensor, bool], torch.Tensor]
) -> Iterator[None]:
    """Within, the layer has `count` experts. The parameters stay changed.

    Args:
        values: what a parameter becomes, by its value and whether it has a row for each
            expert.
    """
    experts = layer.local_num_experts
    made: dict[int, torch.nn.Parameter] = {}
    for name, parameter in layer._parameters.items():
        if parameter is None or name in _OF_THE_ROUTER:
            continue
        if id(parameter) not in made:
            of_experts = parameter.dim() > 0 and parameter.shape[0] == experts
            value = values(parameter.data, of_experts)
            made[id(parameter)] = new = torch.nn.Parameter(value, requires_grad=False)
            vars(new).update(vars(parameter))
        layer._parameters[name] = made[id(parameter)]
    counts = [
        *((layer, name) for name in ("num_experts", "local_num_experts")),
        (layer.quant_method, "num_experts"),
        (layer.moe_config, "num_local_experts"),
    ]
    with ExitStack() as stack:
        for owner, name in counts:
            if getattr(owner, name, None) == experts:
                stack.enter_context(replaced(owner, name, count))
        yield


def _become(
    kept: dict[str, list[torch.Tensor]], values: dict[str, torch.Tensor]
) -> None:
    for name, places in kept.items():
        for tensor in places:
            tensor.data = values[name]


def _tensors_of(layer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """(path, tensor) of every tensor that can be reached from a layer. Those of its own
    are named without a path and come first."""
    seen: set[int] = set()
    own = {**layer._parameters, **layer._buffers, **vars(layer)}
    for name, value in own.items():
        yield from _reached(name, value, seen)


def _reached(path: str, value: Any, seen: set[int]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, torch.Tensor):
        yield path, value
        return
    if id(value) in seen or isinstance(value, _OTHERS):
        return
    seen.add(id(value))
    if isinstance(value, dict):
        items = [(str(key), entry) for key, entry in value.items()]
    elif isinstance(value, list | tuple):
        items = [(str(index), entry) for index, entry in enumerate(value)]
    elif _is_stocks(type(value)) and hasattr(value, "__dict__"):
        items = list(vars(value).items())
    else:
        return
    for name, entry in items:
        yield from _reached(f"{path}.{name}", entry, seen)


def _is_stocks(cls: type) -> bool:
    return cls.__module__.startswith("vllm.") and not cls.__module__.startswith(_OURS)


_OURS = __name__.rpartition(".weights.")[0]

_OTHERS = (torch.nn.Module, FusedMoEConfig, QuantizationConfig, type, str)
"""What leads away from a layer's weights."""


def _refused(
    layer: Any, path: str, tensor: torch.Tensor, reason: str
) -> MoEPrefetchError:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return MoEPrefetchError(
        f"{layer.layer_name} ({type(layer.quant_method).__name__}): {path}, "
        f"{list(tensor.shape)} {dtype}, {reason}, so expert slots cannot follow it. "
        "Serve without --moe-gpu-prefetch."
    )
