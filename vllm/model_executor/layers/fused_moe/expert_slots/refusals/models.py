# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Whether the slots reach every routed expert of a model: asked of a model that was
built, before and after it reads its weights."""

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError
from vllm.model_executor.layers.fused_moe.expert_slots.layer import ExpertSlotsMixin
from vllm.model_executor.layers.fused_moe.expert_slots.refusals.layers import (
    cannot_serve,
    decode_objection,
)


def routed_experts(model: torch.nn.Module) -> list[Any]:
    """The MoE layers of a model, with slots and without."""
    return [module for module in model.modules() if isinstance(module, RoutedExperts)]


def check_built(model: torch.nn.Module, slots: int | str, name: str) -> None:
    """Checks a model that was built and has not read its weights.

    Args:
        slots: as they were asked for.
        name: the model's, or its directory.

    Raises:
        MoEPrefetchError: the slots do not reach every layer, or something else reads
            the experts' weights by expert id.
    """
    layers = routed_experts(model)
    missed = [layer for layer in layers if not isinstance(layer, ExpertSlotsMixin)]
    if missed:
        raise MoEPrefetchError(
            f"--moe-gpu-prefetch {slots}: {len(missed)} of {len(layers)} MoE "
            f"layers of {type(model).__name__} ({name}) cannot be put "
            f"into slots: {missed[0].layer_name} is run by a class of the model's own "
            f"around {type(missed[0]).__name__}. Serve it without --moe-gpu-prefetch."
        )
    if not any(layer.awaits_slots for layer in layers):  # all are stock's
        return
    for module_name, module in model.named_modules():
        if reason := decode_objection(module):
            raise cannot_serve(module_name, module, reason)


def check_loaded(model: torch.nn.Module, slots: int | str, model_config: Any) -> None:
    """Checks a model whose weights have been processed.

    Raises:
        MoEPrefetchError: a layer got no slots, or no layer of a MoE model is vLLM's.
    """
    layers = routed_experts(model)
    unmade = [layer for layer in layers if layer.awaits_slots]
    if unmade:
        method = unmade[0].quant_method.process_weights_after_loading
        raise MoEPrefetchError(
            f"--moe-gpu-prefetch {slots}: {len(unmade)} of {len(layers)} MoE "
            "layers got no slots, because "
            f"{type(unmade[0].quant_method).__name__}.process_weights_after_loading "
            "was replaced, or never called "
            f"({method.__module__}.{method.__qualname__}). Disable the other plugin "
            "with VLLM_PLUGINS, or serve without --moe-gpu-prefetch."
        )
    if not layers and experts_elsewhere(model, model_config):
        raise bypassed(f"{type(model).__name__} ({model_config.model})", slots)


def bypassed(model: str, slots: int | str) -> MoEPrefetchError:
    """The refusal of a MoE model without a fused-MoE layer."""
    return MoEPrefetchError(
        f"--moe-gpu-prefetch {slots}: the experts of the MoE model {model} do not go "
        "through vLLM's fused-MoE layer, so they cannot be put into slots. Serve it "
        "without --moe-gpu-prefetch."
    )


def experts_elsewhere(model: torch.nn.Module, model_config: Any) -> str | None:
    """The name of a parameter that holds routed experts, or their router, in a model
    without a fused-MoE layer; None if no parameter does: then no layer of it is a MoE
    layer.

    An implementation of its own has one parameter for all experts of a layer, the
    expert first, or one for each, with `expert` in its name. Its router is a matrix
    with a row for each expert.
    """
    if not model_config.is_moe:
        return None
    num_experts = model_config.get_num_experts()
    for name, parameter in model.named_parameters():
        parts = [
            part for part in name.split(".") if not part.startswith("shared_expert")
        ]
        stacked = parameter.dim() > 1 and len(parameter) == num_experts
        if stacked or any("expert" in part for part in parts):
            return name
    return None
