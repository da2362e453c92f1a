# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Measures a model without its weights: builds vLLM's own model on the meta device and
adds up.

Runs in a process of its own, because building leaves traces (registered layers, cached
rotary embeddings, a CUDA context) and needs parallel groups that nobody has set up yet.
"""

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.config import ModelConfig, ParallelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.platforms import current_platform
from vllm.platforms.interface import set_assigned_physical_gpu_ids
from vllm.utils.system_utils import get_mp_context
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.attention.backends.utils import resolve_kv_cache_layout
from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec
from vllm.v1.worker.worker_base import WorkerBase

from vllm.model_executor.layers.fused_moe.expert_slots.backend import (
    Backend,
    current_backend,
)
from vllm.model_executor.layers.fused_moe.expert_slots.capacity.planner import (
    GRAPH_BYTES_PER_LAYER,
    Footprint,
    MoELayer,
)
from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError
from vllm.model_executor.layers.fused_moe.expert_slots.refusals.layers import (
    cannot_serve,
    experts_elsewhere,
    kernels_for,
    objection,
    top_k_objection,
)
from vllm.model_executor.layers.fused_moe.expert_slots.replacing import replaced
from vllm.model_executor.layers.fused_moe.expert_slots.versions import kv_cache_bytes
from vllm.model_executor.layers.fused_moe.expert_slots.weights.store import (
    per_expert_parameters,
)
from vllm.plugins import load_general_plugins

_GROUPS = ("_WORLD", "_TP", "_ETP", "_PP", "_DP", "_EP", "_EPLB", "_PCP", "_DCP")

_LIMIT_S = 180

_LARGE = 64 << 20
"""Bytes from which a tensor that a model puts into host memory is not made while
measuring."""


class CannotMeasure(MoEPrefetchError):
    """vLLM cannot build the model from its configuration alone; carries its error."""


@dataclass(frozen=True)
class GpuMemory:
    """Bytes of the smallest of this machine's GPUs, as `cudaMemGetInfo` gives them to a
    process that has a context there. `free` is None where ranks may run on others."""

    total: int
    free: int | None


@dataclass(frozen=True)
class Measurement:
    """What is known of a model and of this machine before anything is started.

    Attributes:
        footprints: of each pipeline stage.
        objection: why layers of the model cannot have slots, or None.
        elsewhere: a parameter of routed experts outside vLLM's fused-MoE layers, or
            None.
        gpu: None on the CPU platform, and where the question is about a GPU elsewhere.
    """

    footprints: tuple[Footprint, ...]
    objection: str | None
    elsewhere: str | None
    gpu: GpuMemory | None


def measure(
    vllm_config: VllmConfig, elsewhere: Callable[[], None] | None = None
) -> Measurement:
    """Measures a model from its configuration alone, and the GPUs that it is to run on.

    Args:
        elsewhere: of a question about another machine's GPU: makes the measuring
            process answer for it.

    Raises:
        CannotMeasure: vLLM cannot build the model.
        MoEPrefetchError: expert slots do not run on this platform, or on these GPUs.
    """
    context = _context(elsewhere is not None)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_measure_and_send, args=(vllm_config, elsewhere, sender), daemon=True
    )
    process.start()
    sender.close()
    try:
        answer = (
            receiver.recv() if receiver.poll(_LIMIT_S) else f"not done in {_LIMIT_S} s"
        )
    except EOFError:
        process.join()
        answer = (
            f"the process that built it ended with status {process.exitcode} (a "
            "script that starts engines guards its main part by __name__ == "
            "'__main__')"
        )
    process.kill()
    process.join()
    if isinstance(answer, Measurement):
        return answer
    if isinstance(answer, MoEPrefetchError):
        raise answer
    raise CannotMeasure(
        f"vLLM cannot build this model from its configuration alone: {answer}"
    )


def _context(elsewhere: bool) -> Any:
    """How the measuring process is started. A fork saves the seconds of importing vLLM
    again; for GPUs of this machine vLLM says itself where it cannot be (CUDA
    initialised, Ray, WSL2)."""
    if elsewhere or current_platform.is_cpu():
        return multiprocessing.get_context("fork")
    return get_mp_context()


def _measure_and_send(
    vllm_config: VllmConfig, elsewhere: Callable[[], None] | None, sender: Connection
) -> None:
    # OpenMP does not survive a fork. Not torch.set_num_threads: vLLM's CPU worker shuts
    # that off.
    torch._C.set_num_threads(1)
    # A spawned process has none; a model may be another plugin's.
    load_general_plugins()
    try:
        sender.send(_measure(vllm_config, elsewhere))
    except MoEPrefetchError as error:
        sender.send(error)
    except Exception as error:
        # Not by `traceback`: it walks all errors behind this one, minutes for a deep
        # recursion.
        sender.send(f"{type(error).__name__}: {in_words(error)}")


def in_words(error: object) -> str:
    """What an error says, in one line of bounded length."""
    words = " ".join(str(error).split())
    return words if len(words) <= 400 else f"{words[:400]}..."


def _measure(
    vllm_config: VllmConfig, elsewhere: Callable[[], None] | None
) -> Measurement:
    backend, parallel = current_backend(), vllm_config.parallel_config
    gpu = None
    if elsewhere is not None:
        elsewhere()
    elif current_platform.is_cuda():
        gpu = _smallest_gpu(parallel)
    stages = [
        _measure_stage(vllm_config, stage, backend)
        for stage in range(parallel.pipeline_parallel_size)
    ]
    footprints, objections, parameters = zip(*stages, strict=True)
    return Measurement(
        footprints,
        next(filter(None, objections), None),
        next(filter(None, parameters), None),
        gpu,
    )


def _smallest_gpu(parallel: ParallelConfig) -> GpuMemory | None:
    """The least of the GPUs that this machine's ranks will run on; None where this
    process sees none.

    Where others place the ranks (Ray, torchrun) they may run on other GPUs than these:
    of those only the total is taken.

    Raises:
        MoEPrefetchError: a GPU shares its memory with the host.
    """
    if parallel.assigned_physical_gpu_ids is not None:
        set_assigned_physical_gpu_ids(parallel.assigned_physical_gpu_ids)
    placed_by_others = parallel.distributed_executor_backend in (
        "ray",
        "external_launcher",
    )
    ranks = 1 if placed_by_others else parallel.world_size // parallel.nnodes
    seen = []
    for rank in range(min(ranks, torch.accelerator.device_count())):
        device = current_platform.logical_device_id_to_visible_device_id(rank)
        if current_platform.is_integrated_gpu(device):
            raise MoEPrefetchError(
                "--moe-gpu-prefetch gains nothing on "
                f"{current_platform.get_device_name(device)}: its memory is the "
                "host's, so slots would be copies beside the experts. Serve without "
                "--moe-gpu-prefetch."
            )
        free, total = torch.accelerator.get_memory_info(device)
        seen.append(GpuMemory(total, None if placed_by_others else free))
    return min(seen, key=lambda gpu: gpu.free or gpu.total, default=None)


def _measure_stage(
    vllm_config: VllmConfig, stage: int, backend: Backend
) -> tuple[Footprint, str | None, str | None]:
    model_config = vllm_config.model_config
    vllm_config = copy(vllm_config)
    # Stock's layers: ours create their experts in host memory.
    vllm_config.additional_config = {}
    vllm_config.device_config = copy(vllm_config.device_config)
    vllm_config.device_config.device = torch.device(
        "meta"
    )  # the transformers backend asks for it
    vllm_config.compilation_config.static_forward_context.clear()
    with (
        _first_rank_of(stage, vllm_config.parallel_config),
        _expert_maps_on_the_host(),
        _traced_once(model_config),
        kernels_for(backend),
        set_default_torch_dtype(model_config.dtype),
        torch.device("meta"),
        _HostTables() as tables,
        set_current_vllm_config(vllm_config),
    ):
        model = initialize_model(vllm_config=vllm_config, model_config=model_config)
        layers = [
            module for module in model.modules() if isinstance(module, RoutedExperts)
        ]
        experts = {id(p) for layer in layers for p in _experts(layer).values()}
        tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
        others = [t for i, t in tensors.items() if i not in experts]
        kv_sequence, kv_block = _kv_cache_bytes(vllm_config)
        footprint = Footprint(
            layers=tuple(_moe_layer(layer, backend) for layer in layers),
            other_weight_bytes=sum(t.nbytes for t in others if not tables.hold(t)),
            kv_sequence_bytes=kv_sequence,
            kv_block_bytes=kv_block,
            activation_bytes=_activation_bytes(vllm_config, layers),
            graph_bytes=_graph_bytes(vllm_config),
            host_table_bytes=tables.num_bytes,
        )
        reason = objection(model, backend)
        bypassing = None if layers else experts_elsewhere(model, model_config)
        return footprint, str(reason) if reason else None, bypassing


class _HostTables(TorchDispatchMode):
    """Within, large tensors that a model explicitly puts into host memory are not made
    (one of these models' tables takes 100 GB), and are known from those of the device.

    Attributes:
        num_bytes: their bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0
        self._kept: list[torch.Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if "view_from_cpu_tensor" in str(func):
            return args[0]  # the device's view of such a tensor
        on_host = (
            str(kwargs.get("device")) == "cpu"
            and func is torch.ops.aten.empty.memory_format
        )
        if on_host:
            table = func(
                *args, **{**kwargs, "device": torch.device("meta"), "pin_memory": False}
            )
            if kwargs.get("pin_memory") or table.nbytes >= _LARGE:
                self.num_bytes += table.nbytes
                self._kept.append(table)
                return table
        return func(*args, **kwargs)

    def hold(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` is one of them."""
        storages = {table.untyped_storage()._cdata for table in self._kept}
        return tensor.untyped_storage()._cdata in storages


def _experts(layer: RoutedExperts) -> dict[str, torch.nn.Parameter]:
    return per_expert_parameters(layer, layer.local_num_experts)


def _moe_layer(layer: RoutedExperts, backend: Backend) -> MoELayer:
    if reason := top_k_objection(layer.moe_config):
        raise cannot_serve(layer.layer_name, layer, reason)
    width, padded = (
        layer.moe_config.intermediate_size_per_partition,
        backend.processed_width(layer),
    )

    def row_bytes(name: str, parameter: torch.nn.Parameter) -> int:
        along_width = name != "w2_bias"
        return (
            parameter[0].nbytes * padded // width
            if along_width
            else parameter[0].nbytes
        )

    rows = tuple((name, row_bytes(name, p)) for name, p in _experts(layer).items())
    share = layer.local_num_experts / layer.global_num_experts
    return MoELayer(layer.local_num_experts, layer.top_k, rows, share)


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
    """Intermediates of the largest batch, an estimate: one layer's and the sampler's.

    A layer holds the input and output of both expert GEMMs for every (token, k), and
    about eight tensors of the hidden size around them. The sampler holds, for every
    sequence, its logits in two precisions, probabilities, and their sorted copy with
    indices: 20 bytes an entry. Torch keeps what one of them has freed, in blocks that
    may not serve the other: they add up.
    """
    model_config, scheduler = vllm_config.model_config, vllm_config.scheduler_config
    hidden, width = model_config.get_hidden_size(), model_config.dtype.itemsize
    routed = max(
        (
            layer.top_k
            * (3 * layer.moe_config.intermediate_size_per_partition + hidden)
            for layer in layers
        ),
        default=0,
    )
    layer_bytes = scheduler.max_num_batched_tokens * (routed + 8 * hidden) * width
    sampler_bytes = scheduler.max_num_seqs * model_config.get_vocab_size() * 20
    return layer_bytes + sampler_bytes


def rows_per_sequence(vllm_config: VllmConfig) -> int:
    """Rows that one decoding sequence has in a step: its own, and those of
    speculation."""
    speculation = vllm_config.speculative_config
    return 1 + (speculation.num_speculative_tokens if speculation else 0)


def _graph_bytes(vllm_config: VllmConfig) -> int:
    """CUDA graphs, an estimate: of every size that is captured, once for each mode, and
    of those that hold more than decoding sequences only in the piecewise mode."""
    compilation, scheduler = (
        vllm_config.compilation_config,
        vllm_config.scheduler_config,
    )
    mode, sizes = compilation.cudagraph_mode, compilation.cudagraph_capture_sizes or []
    if not mode:
        return 0
    most = scheduler.max_num_seqs * rows_per_sequence(vllm_config)
    decoding = sum(size <= most for size in sizes)
    captured = len(sizes) if mode.mixed_mode() else 0
    if mode.separate_routine():
        captured += decoding
    layers = vllm_config.model_config.get_num_layers(vllm_config.parallel_config)
    return captured * layers * GRAPH_BYTES_PER_LAYER


@contextmanager
def _traced_once(model_config: ModelConfig) -> Iterator[None]:
    """vLLM's transformers backend traces the router of every layer to recognise it, for
    a second or two each; the layers of a model are alike."""
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


@contextmanager
def _expert_maps_on_the_host() -> Iterator[None]:
    """Under expert parallelism a layer looks at the values of its expert map, and the
    meta device has none."""
    stock = ExpertMapManager.__init__

    def on_the_host(self: ExpertMapManager, *args: Any, **kwargs: Any) -> None:
        with torch.device("cpu"):
            stock(self, *args, **kwargs)

    with replaced(ExpertMapManager, "__init__", on_the_host):
        yield


@contextmanager
def _first_rank_of(stage: int, parallel: Any) -> Iterator[None]:
    """vLLM's parallel groups as the first tensor-parallel rank of a pipeline stage sees
    them, without a process behind them."""
    tensor, pipeline = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    first = stage * tensor
    members = {
        "_WORLD": list(range(tensor * pipeline)),
        "_PP": list(range(0, tensor * pipeline, tensor)),
    } | {
        name: list(range(first, first + tensor))
        for name in ("_TP", "_ETP", "_EP", "_EPLB")
    }
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
    process_group = SimpleNamespace(
        rank=lambda: ranks.index(rank), size=lambda: len(ranks)
    )
    group.device_group = group.cpu_group = process_group
    group.device_communicator = group.mq_broadcaster = None
    group.use_device_communicator = False
    group.unique_name = f"plan:{rank}"
    return group
