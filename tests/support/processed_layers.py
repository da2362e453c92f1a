# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Layers of quantised experts as vLLM builds and processes them, of any format and
without a model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.quantization import get_quantization_config

from vllm.model_executor.layers.fused_moe import config as moe_config
from vllm.model_executor.layers.fused_moe.expert_slots.capacity.ranks import (
    first_rank_of,
)
from vllm.model_executor.layers.fused_moe.expert_slots.weights.bundle import (
    few_experts,
)

EXPERTS, HIDDEN, WIDTH = 4, 256, 128


@dataclass(frozen=True)
class Format:
    """A format as a checkpoint's config.json names it.

    Attributes:
        method: vLLM's name of it.
        parts: ends of the names of what an expert has after the processing.
        wide: the same of what all experts share.
        unread: the same of parts that the kernel does not read.
        bias: whether the checkpoint has biases.
        backend: what --moe-backend asks for.
        kernel: the experts class that vLLM then chooses.
    """

    method: str
    config: dict[str, Any]
    parts: tuple[str, ...]
    wide: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    dtype: torch.dtype = torch.bfloat16
    bias: bool = False
    backend: str = "marlin"
    kernel: str = "MarlinExperts"

    @property
    def in_parts(self) -> bool:
        """Whether a layer can be processed in parts: without activation scales of the
        checkpoint, and without NVFP4's scales of scales."""
        return not self.wide and "weight_scale_2" not in self.parts


def built(form: Format, experts: int, ranks: int = 1) -> RoutedExperts:
    """A layer as vLLM builds it, before its checkpoint is read; of several ranks of
    expert parallelism, with `experts` each, the last."""
    parallel = moe_config.FusedMoEParallelConfig.make_no_parallel()
    if ranks > 1:
        parallel = replace(parallel, use_ep=True, ep_size=ranks, ep_rank=ranks - 1)
    config = moe_config.FusedMoEConfig(
        num_experts=ranks * experts,
        experts_per_token=1,
        hidden_dim=HIDDEN,
        intermediate_size=WIDTH,
        num_local_experts=experts,
        num_logical_experts=ranks * experts,
        activation=MoEActivation.SILU,
        device="cpu",
        routing_method=moe_config.RoutingMethodType.Renormalize,
        moe_parallel_config=parallel,
        in_dtype=form.dtype,
        has_bias=form.bias,
        moe_backend=form.backend,
    )
    manager = ExpertMapManager(
        max_num_batched_tokens=16,
        top_k=1,
        global_num_experts=ranks * experts,
        num_redundant_experts=0,
        num_expert_group=None,
        moe_parallel_config=parallel,
        placement_strategy="linear",
        enable_eplb=False,
    )
    quant = get_quantization_config(form.method).from_config(form.config)
    return RoutedExperts("mlp.experts", form.dtype, config, quant, manager)


@contextmanager
def building(form: Format) -> Iterator[None]:
    """Within, layers of this format can be built and processed."""
    config, default = VllmConfig(), torch.get_default_dtype()
    config.model_config = SimpleNamespace(
        quantization_config=None, hf_config=SimpleNamespace(model_type=None)
    )
    alone = SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1)
    torch.set_default_dtype(form.dtype)
    try:
        with set_current_vllm_config(config), first_rank_of(0, alone):
            yield
    finally:
        torch.set_default_dtype(default)


def whole(layer: RoutedExperts) -> None:
    """vLLM's processing, of all experts."""
    layer.quant_method.process_weights_after_loading(layer)


def of_few(layer: RoutedExperts) -> None:
    """vLLM's processing of a few experts, as if all were stored."""
    with few_experts(layer, torch.device("cpu")):
        whole(layer)


def processed(
    form: Format,
    tensors: dict[str, torch.Tensor] | None = None,
    process: Callable[[RoutedExperts], None] = whole,
    ranks: int = 1,
) -> Any:
    """A layer that holds `tensors`, random ones if none are given, and what they were,
    after it was processed."""
    experts = EXPERTS if tensors is None else max(map(len, tensors.values()))
    with building(form):
        layer = built(form, experts, ranks)
        if tensors is None:
            tensors = random_tensors(layer)
        for name, parameter in layer.named_parameters(recurse=False):
            parameter.data = tensors[name].clone()
        if form.bias:
            layer._loaded_expert_biases = {"w13_bias", "w2_bias"}
        process(layer)
    kernel = layer.quant_method.moe_kernel.fused_experts
    assert type(kernel).__name__ == form.kernel
    return layer, tensors


def random_tensors(layer: RoutedExperts) -> dict[str, torch.Tensor]:
    """Experts of different size, in each of the layer's parameters."""
    rng = torch.Generator().manual_seed(0)
    made = {}
    for name, parameter in layer.named_parameters(recurse=False):
        shape, dtype = parameter.shape, parameter.dtype
        size = 2.0 ** -torch.arange(len(parameter)).view(-1, *[1] * (len(shape) - 1))
        if dtype == torch.int32:
            value = torch.randint(-(2**31), 2**31, shape, generator=rng)
        elif dtype == torch.int8:
            value = torch.randint(-128, 128, shape, generator=rng)
        elif dtype == torch.uint8:
            value = torch.randint(118, 126, shape, generator=rng)
        elif "scale" in name:
            value = (torch.rand(shape, generator=rng, dtype=torch.float32) + 0.5) * size
        else:
            value = torch.randn(shape, generator=rng, dtype=torch.float32) * size
        made[name] = value.to(dtype)
    return made
