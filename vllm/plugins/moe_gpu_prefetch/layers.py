# SPDX-License-Identifier: Apache-2.0
"""Registers the layer classes in vLLM's out-of-tree registry."""

from vllm.model_executor.custom_op import PluggableLayer, op_registry_oot


def install() -> None:
    """Puts our classes in the place of stock's `RoutedExperts` and `MoERunner`.

    Raises:
        RuntimeError: another plugin holds one of the names.
    """
    from vllm.model_executor.layers.fused_moe.expert_slots.routed_experts import (
        SlottedRoutedExperts,
    )
    from vllm.model_executor.layers.fused_moe.expert_slots.runner import SlottedMoERunner

    for name, cls in (("RoutedExperts", SlottedRoutedExperts), ("MoERunner", SlottedMoERunner)):
        holder = op_registry_oot.get(name)
        if holder is not None and holder is not cls:
            raise RuntimeError(
                f"moe_gpu_prefetch: {name} is already replaced by {holder.__module__}."
                f"{holder.__qualname__}; disable one of the two plugins with VLLM_PLUGINS."
            )
        if holder is None:
            PluggableLayer.register_oot(cls, name=name)
