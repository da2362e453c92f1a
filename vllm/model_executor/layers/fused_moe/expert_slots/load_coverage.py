# SPDX-License-Identifier: Apache-2.0
"""Which parts of which experts a checkpoint brought. Where an expert tensor is missing, stock vLLM
serves whatever the memory held; a model must not be served from such a host store."""

from collections.abc import Sequence
from typing import Any

import torch

from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError

_TENSOR_BY_TENSOR = {"auto", "hf", "safetensors", "pt", "npcache", "mistral", "runai_streamer"}
"""Load formats that hand every checkpoint tensor to the layer's weight loader."""


class LoadCoverage:
    """Records what one layer's weight loader was given."""

    def __init__(self, layer: Any, load_format: str):
        self._layer = layer
        self._complete_expected = str(load_format) in _TENSOR_BY_TENSOR
        self._shards: dict[str, dict[int, set[str]]] = {}
        self._whole: set[str] = set()
        self._names = {id(p): name for name, p in layer.named_parameters(recurse=False)}

    def record(
        self,
        param: torch.nn.Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int | None = None,
        return_success: bool = False,
    ) -> None:
        """Takes the arguments of `RoutedExperts.weight_loader`; no `expert_id` = all experts."""
        name = self._names.get(id(param), weight_name)
        if expert_id is None:
            self._whole.add(name)
            return
        experts = range(self._layer.local_num_experts)  # of a tensor of all experts, [E, ...]
        if loaded_weight.dim() != 3:
            local = self._layer._map_global_expert_id_to_local_expert_id(expert_id)
            experts = range(local, local + 1)
        for expert in experts:
            self._shards.setdefault(name, {}).setdefault(expert, set()).add(shard_id)

    @property
    def used(self) -> bool:
        """Whether the layer's weight loader was called at all. Some models (gpt-oss) copy whole
        tensors into the parameters themselves."""
        return bool(self._shards or self._whole)

    def check(self) -> None:
        """Raises:
        MoEPrefetchError: names the layer, the parameter and the experts that were not loaded.
        """
        if not self._complete_expected:
            return
        weights = {name for name in self._names.values() if name.endswith("_weight")}
        for name in sorted(weights | set(self._shards)):
            if name in self._whole:
                continue
            loaded = self._shards.get(name, {})
            shards = set().union(*loaded.values()) if loaded else {"any part"}
            if name == "w13_weight" and shards & {"w1", "w3"}:
                shards = {"w1", "w3"} if self._layer.moe_config.is_act_and_mul else {"w1"}
            missing = [
                f"{shard} of expert {expert}"
                for expert in range(self._layer.local_num_experts)
                for shard in sorted(shards - loaded.get(expert, set()))
            ]
            if missing:
                more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
                raise MoEPrefetchError(
                    f"the checkpoint is incomplete: {self._layer.layer_name}.{name} got no "
                    f"{', '.join(missing[:4])}{more}. Fetch the checkpoint again."
                )


def check_all(coverages: Sequence[LoadCoverage]) -> None:
    """Checks a model's layers once loading has ended. A model none of whose layers saw a load
    brings its own loader, which is trusted.

    Raises:
        MoEPrefetchError: names the layer, the parameter and the experts that were not loaded.
    """
    if any(coverage.used for coverage in coverages):
        for coverage in coverages:
            coverage.check()
