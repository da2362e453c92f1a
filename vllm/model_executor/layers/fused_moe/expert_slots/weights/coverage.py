# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Whether a checkpoint brought every expert whole. If an expert tensor is missing or
too small, stock vLLM serves what the memory happened to hold. If it is too large, stock
may cut it. No model may be served from such a host store.

There are two checks. A tensor that reaches the layer's weight loader must have the
shape of its part of the unpadded parameter (`check_shape`). And each element of a
parameter must have been copied to (`watching`, `check`), also by models that copy into
the parameters themselves.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)

from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError
from vllm.model_executor.layers.fused_moe.expert_slots.refusals.load_formats import (
    brings_every_tensor,
)
from vllm.model_executor.layers.fused_moe.expert_slots.weights.bundle import (
    WEIGHTS,
    parameters_of_experts,
)
from vllm.model_executor.layers.fused_moe.expert_slots.weights.regions import (
    Region,
    by_row,
    elements,
)

_REQUIRED = (
    *WEIGHTS,
    *("_weight_scale", "_weight_scale_inv", "_weight_scale_2", "_scales"),
)
"""Ends of the names of parameters that a checkpoint must fill. It may lack others, such
as biases and zero points, but not for some of the experts only."""


class LoadCoverage:
    """What a checkpoint brought of one layer's experts.

    Args:
        layer: a `RoutedExperts` with empty parameters, [E, ...] each.
        load_format: vLLM's, of the checkpoint.
    """

    def __init__(self, layer: Any, load_format: str):
        self._layer = layer
        self._complete_expected = brings_every_tensor(load_format)
        self._names = {id(p): name for name, p in layer.named_parameters(recurse=False)}
        self._copied: dict[str, dict[int, set[Region]]] = {}
        self.watched: dict[str, torch.Tensor] = {}

    def check_shape(
        self,
        param: torch.nn.Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int | None = None,
        return_success: bool = False,
    ) -> None:
        """Takes the arguments of `RoutedExperts.weight_loader`, before it copies
        anything.

        Raises:
            MoEPrefetchError: the shape is not that of this part of an expert.
        """
        needed = self._parts(self._names.get(id(param), weight_name)).get(shard_id)
        if needed is None:
            return
        if loaded_weight.dim() == 3:  # of all experts, [E, ...]
            needed = (self._layer.local_num_experts, *needed)
            of = "all experts"
        else:
            of = f"expert {expert_id}"
        if tuple(loaded_weight.shape) != needed:
            name = self._names.get(id(param), weight_name)
            raise self._misfit(name, f"{shard_id} of {of}", loaded_weight.shape, needed)

    def copied(self, name: str, view: torch.Tensor, source: torch.Tensor) -> None:
        """Records that `source` is copied into `view`, a part of the watched parameter
        `name`.

        Raises:
            MoEPrefetchError: the parameter is unquantised, and the two differ in size.
                Torch would repeat a smaller source.
        """
        parameter = self.watched[name]
        if source.numel() != view.numel():
            if self._parts(name):
                part = "all experts" if view.dim() == parameter.dim() else "an expert"
                raise self._misfit(name, part, source.shape, view.shape)
            if source.numel() > 1:
                return  # A scale may be one value for all. Nothing else is whole.
        offset = (view.data_ptr() - parameter.data_ptr()) // parameter.element_size()
        dimensions = zip(view.stride(), view.shape, strict=True)
        extents = sorted(
            ((stride, size) for stride, size in dimensions if size > 1), reverse=True
        )
        experts = self._copied.setdefault(name, {})
        for expert, region in by_row(offset, tuple(extents), parameter[0].numel()):
            experts.setdefault(expert, set()).add(region)

    def watch(self) -> None:
        """Begins to watch the memory that the layer's parameters have now."""
        if self._complete_expected:
            self.watched = {
                name: parameter.data
                for name, parameter in parameters_of_experts(self._layer).items()
            }

    def unwatch(self) -> None:
        """Ends watching, so that this object does not keep the memory alive."""
        self.watched, self._copied = {}, {}

    def check(self) -> None:
        """Checks the layer after its weights have been read and before they are
        processed.

        Raises:
            MoEPrefetchError: names the layer, the parameter and the experts that are
                not whole.
        """
        for name, parameter in self.watched.items():
            regions = self._copied.get(name, {})
            if not regions and not name.endswith(_REQUIRED):
                continue
            size = parameter[0].numel()
            got = [
                elements(size, frozenset(regions.get(e, ())))
                for e in range(len(parameter))
            ]
            needed = self._unpadded(name) or max(got) or size
            broken = [expert for expert, count in enumerate(got) if count < needed]
            if broken:
                more = f" and of {len(broken) - 1} more" if len(broken) > 1 else ""
                raise MoEPrefetchError(
                    f"the checkpoint is incomplete: {self._layer.layer_name}.{name} "
                    f"got {got[broken[0]]} of {needed} elements of expert "
                    f"{self._in_checkpoint(broken[0])}{more}. Fetch the checkpoint "
                    "again."
                )

    def _parts(self, name: str) -> dict[str, tuple[int, ...]]:
        """The shape in the checkpoint of each part of one expert's `name`, by the
        weight loader's shard_id. Empty for packed weights and scales, whose shapes are
        not known here."""
        if not isinstance(self._layer.quant_method, UnquantizedFusedMoEMethod):
            return {}
        config = self._layer.moe_config
        hidden = config.hidden_dim_unpadded
        width = config.intermediate_size_per_partition_unpadded
        width *= config.moe_parallel_config.tp_size
        parts: dict[str, dict[str, tuple[int, ...]]] = {
            "w13_weight": {
                "w1": (width, hidden),
                "w3": (width, hidden),
                "gpt_oss_w13": (hidden, 2 * width),
            },
            "w2_weight": {"w2": (hidden, width), "gpt_oss_w2": (width, hidden)},
            "w13_bias": {"w1": (width,), "w3": (width,), "gpt_oss_w13": (2 * width,)},
            "w2_bias": {"w2": (hidden,), "gpt_oss_w2": (hidden,)},
        }
        return parts.get(name, {})

    def _unpadded(self, name: str) -> int | None:
        """Elements of one expert's `name` on this rank without padding. None if that is
        not known; then the expert with the most elements is taken for whole."""
        parts = self._parts(name)
        if not parts:
            return None
        config = self._layer.moe_config
        if name == "w2_bias":  # each rank has all of it
            return prod(parts["w2"])
        shards = 2 if name.startswith("w13") and config.is_act_and_mul else 1
        part = parts["w2" if name.startswith("w2") else "w1"]
        return shards * prod(part) // config.moe_parallel_config.tp_size

    def _in_checkpoint(self, local: int) -> int:
        """The checkpoint's number of this rank's expert `local`."""
        to_local = self._layer._map_global_expert_id_to_local_expert_id
        experts = range(self._layer.global_num_experts)
        return next((e for e in experts if to_local(e) == local), local)

    def _misfit(
        self, name: str, part: str, found: Sequence[int], needed: Sequence[int]
    ) -> MoEPrefetchError:
        return MoEPrefetchError(
            f"the checkpoint does not fit the model: {self._layer.layer_name}.{name} "
            f"takes {part} as {list(needed)}, the checkpoint has {list(found)}. Fetch "
            "the checkpoint again, or correct its config.json."
        )


@contextmanager
def watching(coverages: Sequence[LoadCoverage]) -> Iterator[None]:
    """Within, weights are read into the layers of `coverages`. At the end each layer is
    checked.

    Raises:
        MoEPrefetchError: a layer's experts are not whole.
    """
    for coverage in coverages:
        coverage.watch()
    try:
        with _Copies(coverages) if any(c.watched for c in coverages) else nullcontext():
            yield
        for coverage in coverages:
            coverage.check()
    finally:
        for coverage in coverages:
            coverage.unwatch()


class _Copies(TorchDispatchMode):
    """Dispatch mode that records copies into watched parameters."""

    def __init__(self, coverages: Sequence[LoadCoverage]):
        super().__init__()
        self._memory = sorted(
            (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, index, name)
            for index, coverage in enumerate(coverages)
            for name, tensor in coverage.watched.items()
        )
        self._starts = [start for start, *_ in self._memory]
        self._coverages = coverages

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Any = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        writes = func in _COPIES or func in _FILLS
        if writes and args[0].device.type == "cpu" and args[0].numel():
            address = args[0].data_ptr()
            place = bisect_right(self._starts, address) - 1
            if place >= 0 and address < self._memory[place][1]:
                _, _, index, name = self._memory[place]
                coverage = self._coverages[index]
                if func in _COPIES:
                    coverage.copied(name, args[0], args[1])
                elif args[0].numel() < coverage.watched[name].numel():
                    coverage.copied(name, args[0], args[0])
        return func(*args, **(kwargs or {}))


_COPIES = {torch.ops.aten.copy_.default, torch.ops.aten.fill_.Tensor}
"""The operators of `view.copy_(tensor)` and `view[...] = tensor`."""

_FILLS = {torch.ops.aten.zero_.default, torch.ops.aten.fill_.Scalar}
"""The operators by which a model sets experts that pad its layout and are in no
checkpoint (Inkling). A whole parameter that is set in this way does not count: a
missing expert would be zeros."""
