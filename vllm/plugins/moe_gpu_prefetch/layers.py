# SPDX-License-Identifier: Apache-2.0
"""Registers the layer classes in vLLM's out-of-tree registry."""

from vllm.model_executor.custom_op import PluggableLayer, op_registry_oot


def _replace(name: str, replacement: type) -> None:
    """Puts `replacement` in the place of the layer class called `name`; idempotent.

    Raises:
        RuntimeError: another plugin holds the name.
    """
    holder = op_registry_oot.get(name)
    if holder is None:
        PluggableLayer.register_oot(replacement, name=name)
    elif holder.__qualname__ != replacement.__qualname__:
        raise RuntimeError(
            f"moe_gpu_prefetch: {name} is already replaced by {holder.__module__}."
            f"{holder.__qualname__}; disable one of the two plugins with VLLM_PLUGINS."
        )


def install() -> None:
    """Puts our classes in the place of stock's `RoutedExperts` and `MoERunner`."""
    from vllm.model_executor.layers.fused_moe.expert_slots.routed_experts import (
        SlottedRoutedExperts,
    )
    from vllm.model_executor.layers.fused_moe.expert_slots.runner import SlottedMoERunner

    _replace("RoutedExperts", SlottedRoutedExperts)
    _replace("MoERunner", SlottedMoERunner)


def install_for_transformers_backend() -> None:
    """Covers the runner that the transformers backend brings along. Apart from `install`, because
    importing that backend takes seconds that no other model should pay."""
    from vllm.model_executor.models.transformers.moe import TransformersMoERunner

    from vllm.model_executor.layers.fused_moe.expert_slots.runner import ExpertSlotsRunnerMixin

    bases = (ExpertSlotsRunnerMixin, TransformersMoERunner)
    _replace("TransformersMoERunner", type("SlottedTransformersMoERunner", bases, {}))
