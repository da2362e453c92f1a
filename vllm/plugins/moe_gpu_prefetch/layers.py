# SPDX-License-Identifier: Apache-2.0
"""Puts the layer classes into vLLM's out-of-tree registry, once slots are asked for: until then the
names are free for other plugins, which vLLM would not let register after us."""

from vllm.model_executor.custom_op import PluggableLayer, op_registry_oot

from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError
from vllm.plugins.moe_gpu_prefetch.seams import require

_OURS = ("vllm.plugins.moe_gpu_prefetch", "vllm.model_executor.layers.fused_moe.expert_slots")
_REPLACED = ("RoutedExperts", "MoERunner")


def held_by_another(names: tuple[str, ...] = _REPLACED) -> str | None:
    """Which of the layer classes that we replace another plugin has replaced, and by what."""
    for name in names:
        holder = op_registry_oot.get(name)
        if holder is not None and not holder.__module__.startswith(_OURS):
            return f"{name} by {holder.__module__}.{holder.__qualname__}"
    return None


def _replace(name: str, replacement: type) -> None:
    """Puts `replacement` in the place of the layer class called `name`; idempotent.

    Raises:
        MoEPrefetchError: another plugin holds the name.
    """
    if taken := held_by_another((name,)):
        raise MoEPrefetchError(replaced(taken))
    if name not in op_registry_oot:
        PluggableLayer.register_oot(replacement, name=name)


def replaced(what: str) -> str:
    """Why slots cannot be where another plugin is."""
    return (
        f"another plugin replaced {what}, so that expert slots would not be reached: disable one "
        "of the two with VLLM_PLUGINS, or serve without --moe-gpu-prefetch."
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
    require("vllm.model_executor.models.transformers.moe:TransformersMoERunner")
    from vllm.model_executor.models.transformers.moe import TransformersMoERunner

    from vllm.model_executor.layers.fused_moe.expert_slots.runner import ExpertSlotsRunnerMixin

    bases = (ExpertSlotsRunnerMixin, TransformersMoERunner)
    _replace(
        "TransformersMoERunner",
        type("SlottedTransformersMoERunner", bases, {"__module__": __name__}),
    )
