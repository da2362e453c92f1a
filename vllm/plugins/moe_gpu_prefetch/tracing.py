# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Records the trace of a worker, if the user asked for one."""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from vllm.distributed import get_world_group
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity

from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchConfig
from vllm.model_executor.layers.fused_moe.expert_slots.decisions.policy import Ranking
from vllm.model_executor.layers.fused_moe.expert_slots.sizes import size_in_bytes
from vllm.model_executor.layers.fused_moe.expert_slots.trace.file import trace_path
from vllm.model_executor.layers.fused_moe.expert_slots.trace.format import (
    Header,
    LayerHeader,
)
from vllm.model_executor.layers.fused_moe.expert_slots.trace.recorder import (
    TraceRecorder,
)
from vllm.plugins.moe_gpu_prefetch.worker import all_slotted_layers

logger = init_logger(__name__)


def start_trace(worker: Any, starts: Mapping[str, Ranking]) -> TraceRecorder | None:
    """Begins the recording of a worker that has warmed up. None if none was asked for,
    if another rank records the same, or if it is impossible; then the log says why.

    Args:
        worker: vLLM's.
        starts: what the slots of each layer begin with, by layer name, where it is not
            experts 0 ... N-1.
    """
    config = MoEPrefetchConfig.of(worker.vllm_config)
    if config is None or config.trace is None:
        return None
    slotted = all_slotted_layers(worker.vllm_config)
    if not slotted:
        logger.warning("Trace: nothing is recorded, for no layer here has slots.")
        return None
    layers = [layer for layer in slotted if layer.slot_manager.ring is not None]
    if not layers:
        return None
    rank = get_world_group().rank
    path = trace_path(config.trace, rank)
    try:
        recorder = TraceRecorder(
            path,
            size_in_bytes(config.trace_limit),
            _header(worker, rank, layers, starts),
            {
                layer.layer_name: (layer.slot_manager.ring, layer.slot_manager.counters)
                for layer in layers
            },
        )
    except Exception as error:  # the engine serves without a trace
        logger.warning("Trace: %s is not recorded: %s", path, error)
        return None
    logger.info(
        "Trace: the experts that each step needs are recorded in %s, up to %s.",
        path,
        config.trace_limit,
    )
    return recorder


def _header(
    worker: Any, rank: int, layers: list[Any], starts: Mapping[str, Ranking]
) -> Header:
    return Header(
        model=str(worker.vllm_config.model_config.model),
        rank=rank,
        platform=current_platform.device_name,
        vllm=version("vllm"),
        max_num_seqs=worker.vllm_config.scheduler_config.max_num_seqs,
        link=layers[0].slot_manager.counters.link,
        kv_bytes_per_token=_kv_bytes_per_token(worker),
        layers=[_constants(layer, starts.get(layer.layer_name)) for layer in layers],
    )


def _constants(layer: Any, start: Ranking | None) -> LayerHeader:
    manager = layer.slot_manager
    if start is not None:
        start = start.fitted(manager.num_experts, manager.num_slots)
    return LayerHeader(
        name=layer.layer_name,
        num_experts=manager.num_experts,
        num_slots=manager.num_slots,
        top_k=layer.top_k,
        routed=layer.routed,
        bytes_per_expert=manager.store.bytes_per_expert,
        policy=manager.config.policy,
        lfu_half_life=manager.config.lfu_half_life,
        experts=None if start is None else start.experts,
        counts=None if start is None else start.counts,
    )


def _kv_bytes_per_token(worker: Any) -> float | None:
    """Bytes of KV cache of one token of a long request on this rank. None if the model
    has no such cache, or if this vLLM keeps its layout elsewhere."""
    cache = getattr(worker.model_runner, "kv_cache_config", None)
    if cache is None or not cache.kv_cache_groups:
        return None
    tokens, _ = get_kv_cache_capacity(worker.vllm_config, cache)
    # Each tensor has the size of the one allocation that all of them lie in.
    size = max(tensor.size for tensor in cache.kv_cache_tensors)
    return size / tokens if tokens else None
