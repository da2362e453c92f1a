# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The footprint of one pipeline stage: builds vLLM's own model on the meta device and
adds up its tensors."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from types import SimpleNamespace
from typing import Any

import torch
from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.attention.backends.utils import resolve_kv_cache_layout
from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec
from vllm.v1.worker.worker_base import WorkerBase

from vllm.model_executor.layers.fused_moe.expert_slots.backend import Backend
from vllm.model_executor.layers.fused_moe.expert_slots.capacity.estimates import (
    activation_bytes,
    graph_bytes,
)
from vllm.model_executor.layers.fused_moe.expert_slots.capacity.host_tables import (
    HostTables,
)
from vllm.model_executor.layers.fused_moe.expert_slots.capacity.mla import (
    context_bytes,
    mla_layers,
    projection_bytes,
)
from vllm.model_executor.layers.fused_moe.expert_slots.capacity.plan import (
    Footprint,
    MoELayer,
)
from vllm.model_executor.layers.fused_moe.expert_slots.capacity.processed import (
    Processed,
    processed,
)
from vllm.model_executor.layers.fused_moe.expert_slots.capacity.ranks import (
    expert_maps_on_the_host,
    first_rank_of,
)
from vllm.model_executor.layers.fused_moe.expert_slots.refusals.layers import (
    cannot_serve,
    kernels_for,
    model_objection,
    top_k_objection,
)
from vllm.model_executor.layers.fused_moe.expert_slots.refusals.models import (
    experts_elsewhere,
)
from vllm.model_executor.layers.fused_moe.expert_slots.replacing import replaced
from vllm.model_executor.layers.fused_moe.expert_slots.versions import kv_cache_bytes
from vllm.model_executor.layers.fused_moe.expert_slots.weights.bundle import (
    parameters_of_experts,
)


def measure_stage(
    vllm_config: VllmConfig, stage: int, backend: Backend
) -> tuple[Footprint, str | None, str | None]:
    """Measures the first rank of a pipeline stage. Changes this process: vLLM keeps
    what it registered while building.

    Returns:
        The footprint; why the model's layers cannot have slots, or None; the name of a
            parameter of routed experts outside vLLM's fused-MoE layers, or None.

    Raises:
        MoEPrefetchError: the router's top-k is not served.
    """
    model_config = vllm_config.model_config
    vllm_config = copy(vllm_config)
    # Stock's layers: ours create their experts in host memory.
    vllm_config.additional_config = {}
    # The transformers backend builds on the device that is named here.
    vllm_config.device_config = copy(vllm_config.device_config)
    vllm_config.device_config.device = torch.device("meta")
    vllm_config.compilation_config.static_forward_context.clear()
    dtype: Any = model_config.dtype  # vLLM has settled it
    with (
        first_rank_of(stage, vllm_config.parallel_config),
        expert_maps_on_the_host(),
        _traced_once(model_config),
        kernels_for(backend),
        set_default_torch_dtype(dtype),
        torch.device("meta"),
        HostTables() as tables,
        set_current_vllm_config(vllm_config),
    ):
        model = initialize_model(vllm_config=vllm_config, model_config=model_config)
        layers = [
            module for module in model.modules() if isinstance(module, RoutedExperts)
        ]
        experts = {
            id(p) for layer in layers for p in parameters_of_experts(layer).values()
        }
        tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
        others = [t for i, t in tensors.items() if i not in experts]
        kv_sequence, kv_block = _kv_cache_bytes(vllm_config)
        latent = mla_layers(model)
        context = max((context_bytes(layer, dtype) for layer in latent), default=0)
        objection = model_objection(model, backend)
        known = None if objection else dict[Any, Processed]()
        footprint = Footprint(
            layers=tuple(_moe_layer(layer, backend, known) for layer in layers),
            other_weight_bytes=sum(t.nbytes for t in others if not tables.hold(t))
            + sum(projection_bytes(layer, dtype) for layer in latent),
            kv_sequence_bytes=kv_sequence,
            kv_block_bytes=kv_block,
            activation_bytes=activation_bytes(vllm_config, layers, context),
            graph_bytes=graph_bytes(vllm_config),
            host_table_bytes=tables.num_bytes,
        )
        bypassing = None if layers else experts_elsewhere(model, model_config)
        return footprint, objection, bypassing


def _moe_layer(
    layer: RoutedExperts, backend: Backend, known: dict[Any, Processed] | None
) -> MoELayer:
    """A layer as it is once it has been processed; as it is in the checkpoint if
    `known` is None, because slots do not serve it."""
    if reason := top_k_objection(layer.moe_config):
        raise cannot_serve(layer.layer_name, layer, reason)
    peak = 0
    if known is None:
        parameters = parameters_of_experts(layer).items()
        rows = tuple((name, p[0].nbytes) for name, p in parameters)
    else:
        on_gpu = backend.processes_on_device(layer)
        rows, peak = processed(layer, known)
        peak = peak if on_gpu else 0
    share = layer.local_num_experts / layer.global_num_experts
    return MoELayer(layer.local_num_experts, layer.top_k, rows, share, peak)


def _kv_cache_bytes(vllm_config: VllmConfig) -> tuple[int, int]:
    """Bytes of KV cache of one sequence of `max_model_len`, and of one block."""
    current_platform.update_block_size_for_backend(vllm_config)
    specs = get_kv_cache_spec(vllm_config)
    if not specs:
        return 0, 0
    worker: Any = SimpleNamespace(vllm_config=vllm_config)
    layouts = WorkerBase.get_supported_kv_cache_layouts(worker)
    vllm_config.cache_config.kv_cache_layout = None
    resolve_kv_cache_layout(vllm_config, [layouts], specs.values())
    return kv_cache_bytes(vllm_config, specs)


@contextmanager
def _traced_once(model_config: ModelConfig) -> Iterator[None]:
    """Within, vLLM's transformers backend traces each class of router once. It traces
    the router of every layer, which takes a second or two each, and the layers of a
    model are alike."""
    if not model_config.using_transformers_backend():
        yield
        return
    from vllm.model_executor.models.transformers.fusers import moe as fusers

    stock, graphs = fusers.trace, dict[type, Any]()

    def trace(module: torch.nn.Module) -> Any:
        if type(module) not in graphs:
            graphs[type(module)] = stock(module)
        return graphs[type(module)]

    with replaced(fusers, "trace", trace):
        yield
