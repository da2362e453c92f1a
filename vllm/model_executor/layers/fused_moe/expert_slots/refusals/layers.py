# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Whether the experts of a layer can be kept in slots. Asked of a layer while it is
built, and of stock's layers on the meta device before anything starts."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from vllm.model_executor.layers.fused_moe.expert_slots.backend import Backend
from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError
from vllm.model_executor.layers.fused_moe.expert_slots.replacing import replaced

_OURS = __name__.rpartition(".refusals.")[0]

_RUNNERS = {
    MoERunner.__module__: "MoERunner",
    "vllm.model_executor.models.transformers.moe": "TransformersMoERunner",
}
"""Runners that leave the experts' weights to the kernel."""

_OWN_DECODE = ("specialized_decode_config", "bf16_decode")
"""Attributes by which models of vLLM say that decode kernels of their own read the
experts' weights by expert id (Kimi-K3, DeepSeek-V4.1; Flint)."""


def cannot_serve(name: str, module: torch.nn.Module, reason: str) -> MoEPrefetchError:
    """What to say of a part of a model that cannot be served from slots."""
    return MoEPrefetchError(
        f"--moe-gpu-prefetch cannot serve {name} ({_stock_class(module).__name__}): "
        f"{reason}. Serve without --moe-gpu-prefetch."
    )


def objection(model: torch.nn.Module, backend: Backend) -> MoEPrefetchError | None:
    """Why a model of stock's layers cannot be served from slots, or None. It does not
    hold for layers whose experts are all resident: those stay stock's.

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
            return cannot_serve(getattr(module, "layer_name", name), module, reason)
    return None


@contextmanager
def kernels_for(backend: Backend) -> Iterator[None]:
    """Within, stock builds its layers with the kernels that it would choose for
    slots."""
    stock = RoutedExperts.__init__

    def prepared(self: RoutedExperts, *args: Any, **kwargs: Any) -> None:
        backend.prepare(*configs_among(*args, *kwargs.values()))
        stock(self, *args, **kwargs)

    with replaced(RoutedExperts, "__init__", prepared):
        yield


def configs_among(*arguments: Any) -> tuple[FusedMoEConfig, QuantizationConfig | None]:
    """The layer's configuration and its quantisation's, wherever a class derived from
    `RoutedExperts` takes them."""
    moe = next(value for value in arguments if isinstance(value, FusedMoEConfig))
    quant = (value for value in arguments if isinstance(value, QuantizationConfig))
    return moe, next(quant, None)


def layer_objection(layer: RoutedExperts, backend: Backend) -> str | None:
    """Why a layer that stock has built cannot have slots. The parallel reasons stand in
    `conflicts.py` too: VLLM_DP_SIZE and a VllmConfig that is made without EngineArgs go
    past it."""
    parallel = layer.moe_config.moe_parallel_config
    own: Any = _stock_class(layer)
    if reason := top_k_objection(layer.moe_config):
        return reason
    if own.forward_modular is not RoutedExperts.forward_modular:
        return (
            f"{own.__module__}.{own.__name__} works on the router's choices in a "
            "forward_modular of its own"
        )
    if parallel.dp_size > 1 or parallel.pcp_size > 1:
        return (
            "ranks of data or prefill context parallelism hand each other their "
            "tokens; use tensor parallelism"
        )
    if parallel.enable_eplb:
        return "EPLB moves experts between ranks; drop --enable-eplb"
    if layer.moe_config.is_lora_enabled:
        return "LoRA adapters are indexed by expert id; drop --enable-lora"
    method = type(layer.quant_method)
    if (
        issubclass(method, UnquantizedFusedMoEMethod)
        and method is not UnquantizedFusedMoEMethod
    ):
        whose = (
            "a model's own"
            if method.__module__.startswith("vllm.")
            else "another plugin's"
        )
        return f"its method {method.__module__}.{method.__qualname__} is {whose}"
    return backend.objection(layer)


def top_k_objection(moe_config: FusedMoEConfig) -> str | None:
    """Why no router can choose so many experts."""
    top_k, experts = moe_config.experts_per_token, moe_config.num_experts
    if 1 <= top_k <= experts:
        return None
    return (
        f"its router chooses {top_k} of {experts} experts for a token, and the number "
        f"must lie in 1 ... {experts}; correct the model's config.json"
    )


def runner_objection(runner: MoERunner) -> str | None:
    """Why what a runner computes may not fit slots: one of a model's own may read the
    experts' weights by its own ids, and rows are not ids."""
    own = _stock_class(runner)
    if _RUNNERS.get(own.__module__) == own.__name__:
        return None
    return (
        f"it is run by {own.__module__}.{own.__name__}, which is not known to leave "
        "the experts' weights to the kernel"
    )


def decode_objection(module: torch.nn.Module) -> str | None:
    """Why a part of a model would read the experts' weights past their tables."""
    for attribute in _OWN_DECODE:
        if getattr(module, attribute, None) is not None:
            return (
                f"it has decode kernels of its own ({attribute}), which read the "
                "experts' weights by expert id"
            )
    return None


def experts_elsewhere(model: torch.nn.Module, model_config: Any) -> str | None:
    """The name of a parameter that holds routed experts, or their router, in a model
    without a fused-MoE layer; None where it has no such parameter: then no layer of it
    is a MoE layer.

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


def _stock_class(module: torch.nn.Module) -> type:
    """The class of stock's, or of a model's own, that one of ours is mixed into."""
    return next(
        cls for cls in type(module).__mro__ if not cls.__module__.startswith(_OURS)
    )
