# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Layers whose experts cannot be kept in slots. Asked of a layer while it is built, and
of stock's layers on the meta device before anything starts."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

from vllm.model_executor.layers.fused_moe.expert_slots.backend import Backend
from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError
from vllm.model_executor.layers.fused_moe.expert_slots.refusals import reasons
from vllm.model_executor.layers.fused_moe.expert_slots.refusals.formats import (
    format_objection,
)
from vllm.model_executor.layers.fused_moe.expert_slots.replacing import replaced

_OURS = __name__.rpartition(".refusals.")[0]

STOCK_RUNNERS = {
    MoERunner.__module__: "MoERunner",
    "vllm.model_executor.models.transformers.moe": "TransformersMoERunner",
}
"""Runners that leave the experts' weights to the kernel."""

DECODE_ATTRIBUTES = ("specialized_decode_config", "bf16_decode")
"""Attributes of vLLM's models with decode kernels of their own (Kimi-K3, DeepSeek-V4.1;
Flint)."""


def cannot_serve(name: str, module: torch.nn.Module, reason: str) -> MoEPrefetchError:
    """The refusal of a part of a model."""
    return MoEPrefetchError(
        f"--moe-gpu-prefetch cannot serve {name} ({_stock_class(module).__name__}): "
        f"{reason}. Serve without --moe-gpu-prefetch."
    )


def model_objection(model: torch.nn.Module, backend: Backend) -> str | None:
    """Why a model of stock's layers cannot be served from slots, or None. Layers whose
    experts are all resident are stock's, and can.

    Args:
        model: built by stock, on any device, within `kernels_for(backend)`.
    """
    for name, module in model.named_modules():
        if isinstance(module, RoutedExperts):
            reason = layer_objection(module, backend)
        elif isinstance(module, MoERunner):
            reason = runner_objection(module)
        else:
            reason = decode_objection(module)
        if reason:
            at = getattr(module, "layer_name", name)
            return str(cannot_serve(at, module, reason))
    return None


@contextmanager
def kernels_for(backend: Backend) -> Iterator[None]:
    """Within, stock builds its layers with the kernels that it would choose for
    slots."""
    stock = RoutedExperts.__init__

    def choosing(self: RoutedExperts, *args: Any, **kwargs: Any) -> None:
        try:
            with backend.choosing_kernels(moe_config_among(*args, *kwargs.values())):
                stock(self, *args, **kwargs)
        except MoEPrefetchError:
            stock(self, *args, **kwargs)  # with its own kernel, which is objected to

    with replaced(RoutedExperts, "__init__", choosing):
        yield


def moe_config_among(*arguments: Any) -> FusedMoEConfig:
    """The layer's configuration, among the arguments of a class derived from
    `RoutedExperts`."""
    return next(value for value in arguments if isinstance(value, FusedMoEConfig))


def layer_objection(layer: RoutedExperts, backend: Backend) -> str | None:
    """Why a layer that stock has built cannot have slots, or None."""
    parallel = layer.moe_config.moe_parallel_config
    own: Any = _stock_class(layer)
    if reason := top_k_objection(layer.moe_config):
        return reason
    if own.forward_modular is not RoutedExperts.forward_modular:
        return (
            f"the forward_modular of {own.__module__}.{own.__name__} rewrites expert "
            "ids itself, and we have no proof that slots give the same result there"
        )
    if parallel.dp_size > 1:
        return reasons.DATA_PARALLEL
    if parallel.pcp_size > 1:
        return reasons.CONTEXT_PARALLEL
    if parallel.enable_eplb:
        return reasons.EPLB
    if layer.moe_config.is_lora_enabled:
        return reasons.LORA
    return format_objection(layer) or backend.objection(layer)


def top_k_objection(moe_config: FusedMoEConfig) -> str | None:
    """Why no router can choose so many experts for a token, or None."""
    top_k, experts = moe_config.experts_per_token, moe_config.num_experts
    if 1 <= top_k <= experts:
        return None
    return (
        f"its router chooses {top_k} of {experts} experts for a token, and the number "
        f"must lie in 1 ... {experts}: correct the model's config.json"
    )


def runner_objection(runner: MoERunner) -> str | None:
    """Why a runner cannot run a layer with slots, or None. A runner class of a model's
    own may read the experts' weights by expert id, and rows are not ids."""
    own = _stock_class(runner)
    if STOCK_RUNNERS.get(own.__module__) == own.__name__:
        return None
    return (
        f"it is run by {own.__module__}.{own.__name__}, which may read the experts' "
        "weights by expert id"
    )


def decode_objection(module: torch.nn.Module) -> str | None:
    """Why a part of a model would read the experts' weights past the slots' tables, or
    None."""
    for attribute in DECODE_ATTRIBUTES:
        if getattr(module, attribute, None) is not None:
            return f"{reasons.OWN_DECODE} ({attribute})"
    return None


def _stock_class(module: torch.nn.Module) -> type:
    """The class of stock's, or of a model's own, that one of ours is mixed into."""
    return next(
        cls for cls in type(module).__mro__ if not cls.__module__.startswith(_OURS)
    )
