# SPDX-License-Identifier: Apache-2.0
"""Measures a model without its weights: builds vLLM's own model on the meta device and adds up.

Runs in a process of its own, because building leaves traces (registered layers, cached rotary
embeddings, a CUDA context) and needs parallel groups that nobody has set up yet.
"""

import multiprocessing
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.attention.backends.utils import resolve_kv_cache_layout
from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec
from vllm.v1.worker.worker_base import WorkerBase

from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError
from vllm.model_executor.layers.fused_moe.expert_slots.memory_plan import Footprint, MoELayer
from vllm.model_executor.layers.fused_moe.expert_slots.versions import kv_cache_bytes
from vllm.model_executor.layers.fused_moe.expert_slots.weights.store import per_expert_parameters

_GROUPS = ("_WORLD", "_TP", "_ETP", "_PP", "_DP", "_EP", "_EPLB", "_PCP", "_DCP")

_LIMIT_S = 180


def measure(vllm_config: VllmConfig) -> list[Footprint]:
    """The footprint of each pipeline stage of a model, from its configuration alone.

    Raises:
        MoEPrefetchError: vLLM cannot build the model; carries its error.
    """
    # A fork saves the seconds of importing vLLM again; it could not touch an initialised CUDA.
    context: Any = multiprocessing.get_context("spawn" if torch.cuda.is_initialized() else "fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_and_send, args=(vllm_config, sender), daemon=True)
    process.start()
    sender.close()
    try:
        answer = receiver.recv() if receiver.poll(_LIMIT_S) else f"not done in {_LIMIT_S} s"
    except EOFError:
        process.join()
        answer = f"the process that built it ended with status {process.exitcode}"
    process.kill()
    process.join()
    if isinstance(answer, str):
        raise MoEPrefetchError(
            f"vLLM cannot build this model from its configuration alone: {answer}"
        )
    return answer


def _measure_and_send(vllm_config: VllmConfig, sender: Connection) -> None:
    # OpenMP does not survive a fork. Not torch.set_num_threads: vLLM's CPU worker shuts that off.
    torch._C.set_num_threads(1)
    try:
        stages = range(vllm_config.parallel_config.pipeline_parallel_size)
        sender.send([_measure_stage(vllm_config, stage) for stage in stages])
    except Exception as error:
        reason = traceback.format_exception_only(error)[-1].strip()
        sender.send(reason)


def _measure_stage(vllm_config: VllmConfig, stage: int) -> Footprint:
    model_config = vllm_config.model_config
    vllm_config = copy(vllm_config)
    vllm_config.additional_config = {}  # stock's layers: ours create their experts in host memory
    vllm_config.compilation_config.static_forward_context.clear()
    with (
        _first_rank_of(stage, vllm_config.parallel_config),
        _expert_maps_on_the_host(),
        set_default_torch_dtype(model_config.dtype),
        torch.device("meta"),
        set_current_vllm_config(vllm_config),
    ):
        model = initialize_model(vllm_config=vllm_config, model_config=model_config)
        layers = [module for module in model.modules() if isinstance(module, RoutedExperts)]
        experts = {id(p) for layer in layers for p in _experts(layer).values()}
        tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
        kv_sequence, kv_block = _kv_cache_bytes(vllm_config)
        return Footprint(
            layers=tuple(_moe_layer(layer) for layer in layers),
            other_weight_bytes=sum(t.nbytes for i, t in tensors.items() if i not in experts),
            kv_sequence_bytes=kv_sequence,
            kv_block_bytes=kv_block,
            activation_bytes=_activation_bytes(vllm_config, layers),
        )


def _experts(layer: RoutedExperts) -> dict[str, torch.nn.Parameter]:
    return per_expert_parameters(layer, layer.local_num_experts)


def _moe_layer(layer: RoutedExperts) -> MoELayer:
    rows = tuple((name, p[0].nbytes) for name, p in _experts(layer).items())
    return MoELayer(layer.local_num_experts, layer.top_k, rows)


def _kv_cache_bytes(vllm_config: VllmConfig) -> tuple[int, int]:
    """KV cache of one sequence of `max_model_len`, and of one block."""
    current_platform.update_block_size_for_backend(vllm_config)
    specs = get_kv_cache_spec(vllm_config)
    if not specs:
        return 0, 0
    worker = SimpleNamespace(vllm_config=vllm_config)
    layouts = WorkerBase.get_supported_kv_cache_layouts(worker)
    vllm_config.cache_config.kv_cache_layout = None
    resolve_kv_cache_layout(vllm_config, [layouts], specs.values())
    return kv_cache_bytes(vllm_config, specs)


def _activation_bytes(vllm_config: VllmConfig, layers: list[RoutedExperts]) -> int:
    """Intermediates of the largest batch, an estimate: the greater of one layer's and the
    sampler's.

    A layer holds the input and output of both expert GEMMs for every (token, k), and about eight
    tensors of the hidden size around them. The sampler holds, for every sequence, its logits in
    two precisions, probabilities, and their sorted copy with indices: 20 bytes an entry.
    """
    model_config, scheduler = vllm_config.model_config, vllm_config.scheduler_config
    hidden, width = model_config.get_hidden_size(), model_config.dtype.itemsize
    routed = max(
        (
            layer.top_k * (3 * layer.moe_config.intermediate_size_per_partition + hidden)
            for layer in layers
        ),
        default=0,
    )
    layer_bytes = scheduler.max_num_batched_tokens * (routed + 8 * hidden) * width
    sampler_bytes = scheduler.max_num_seqs * model_config.get_vocab_size() * 20
    return max(layer_bytes, sampler_bytes)


@contextmanager
def _expert_maps_on_the_host() -> Iterator[None]:
    """Under expert parallelism a layer looks at the values of its expert map, and the meta device
    has none."""
    stock = ExpertMapManager.__init__

    def on_the_host(self: ExpertMapManager, *args: Any, **kwargs: Any) -> None:
        with torch.device("cpu"):
            stock(self, *args, **kwargs)

    ExpertMapManager.__init__ = on_the_host  # type: ignore[method-assign]
    try:
        yield
    finally:
        ExpertMapManager.__init__ = stock  # type: ignore[method-assign]


@contextmanager
def _first_rank_of(stage: int, parallel: Any) -> Iterator[None]:
    """vLLM's parallel groups as the first tensor-parallel rank of a pipeline stage sees them,
    without a process behind them."""
    tensor, pipeline = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    first = stage * tensor
    members = {
        "_WORLD": list(range(tensor * pipeline)),
        "_PP": list(range(0, tensor * pipeline, tensor)),
    } | {name: list(range(first, first + tensor)) for name in ("_TP", "_ETP", "_EP", "_EPLB")}
    before = {name: getattr(parallel_state, name) for name in _GROUPS}
    for name in _GROUPS:
        setattr(parallel_state, name, _group(first, members.get(name, [first])))
    try:
        yield
    finally:
        for name, group in before.items():
            setattr(parallel_state, name, group)


def _group(rank: int, ranks: list[int]) -> parallel_state.GroupCoordinator:
    group = object.__new__(parallel_state.GroupCoordinator)
    group.rank, group.ranks, group.world_size = rank, ranks, len(ranks)
    group.local_rank, group.rank_in_group = rank, ranks.index(rank)
    group.device = torch.device("meta")
    process_group = SimpleNamespace(rank=lambda: ranks.index(rank), size=lambda: len(ranks))
    group.device_group = group.cpu_group = process_group
    group.device_communicator = group.mq_broadcaster = None
    group.use_device_communicator = False
    group.unique_name = f"plan:{rank}"
    return group
