# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Loads a model with its experts in slots: what happens around stock's loading and
after it."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from vllm.distributed import get_world_group
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.platforms import current_platform
from vllm.utils.mem_utils import MemorySnapshot

from vllm.model_executor.layers.fused_moe.expert_slots.capacity.device_memory import (
    DeviceUse,
    shortfall,
)
from vllm.model_executor.layers.fused_moe.expert_slots.capacity.link import (
    link_cost,
    measured_bandwidth,
    staging_copies,
)
from vllm.model_executor.layers.fused_moe.expert_slots.capacity.planner import (
    resident_sequences,
)
from vllm.model_executor.layers.fused_moe.expert_slots.config import (
    MoEPrefetchConfig,
    MoEPrefetchError,
)
from vllm.model_executor.layers.fused_moe.expert_slots.layer import (
    ExpertSlotsMixin,
    building,
    slotted_layers,
)
from vllm.model_executor.layers.fused_moe.expert_slots.refusals.arguments import (
    bypassed,
)
from vllm.model_executor.layers.fused_moe.expert_slots.refusals.layers import (
    cannot_serve,
    decode_objection,
    experts_elsewhere,
)
from vllm.model_executor.layers.fused_moe.expert_slots.shared_store.identity import (
    checkpoint_directory,
    store_identity,
)
from vllm.model_executor.layers.fused_moe.expert_slots.shared_store.store import (
    SharedStore,
    loading_into,
    make_place,
    shared_store,
)
from vllm.model_executor.layers.fused_moe.expert_slots.sizes import GIB
from vllm.model_executor.layers.fused_moe.expert_slots.warm_start import (
    WARM_START,
    ResidentsFile,
    ResidentsKeeper,
    residents_identity,
)
from vllm.model_executor.layers.fused_moe.expert_slots.weights.coverage import watching
from vllm.model_executor.layers.fused_moe.expert_slots.weights.windows import (
    reading_in_windows,
)
from vllm.plugins.moe_gpu_prefetch import layers
from vllm.plugins.moe_gpu_prefetch.stock import wrapping
from vllm.plugins.moe_gpu_prefetch.stock.seams import require

logger = init_logger(__name__)


def all_slotted_layers(vllm_config: Any) -> list[Any]:
    """The MoE layers with slots of this worker, of the model and of its draft."""
    return slotted_layers(
        vllm_config.compilation_config.static_forward_context.values()
    )


def _files_of(
    loader: BaseModelLoader, vllm_config: Any, model_config: Any, option: str
) -> Path:
    """The directory of a model, whose files say what `option` keeps.

    Raises:
        MoEPrefetchError: it is not on this machine.
    """
    loader.download_model(model_config)
    directory = checkpoint_directory(vllm_config, model_config)
    if directory is None:
        raise MoEPrefetchError(
            f"--moe-gpu-prefetch-config.{option}: the files of {model_config.model} "
            "are not on this machine, so that this model cannot be told from "
            f"another. Give the model's directory, or serve without {option}."
        )
    return directory


@contextmanager
def _store_for(
    loader: BaseModelLoader,
    vllm_config: Any,
    model_config: Any,
    config: MoEPrefetchConfig,
) -> Iterator[SharedStore | None]:
    """The shared store of this model and rank, for the time of loading, if one was
    asked for."""
    if config.shared_store is None:
        yield None
        return
    directory = _files_of(loader, vllm_config, model_config, "shared_store")
    rank = get_world_group().rank
    identity = store_identity(vllm_config, model_config, directory, rank)
    with shared_store(Path(config.shared_store), identity) as store:
        yield store


def check_built(
    model: torch.nn.Module, config: MoEPrefetchConfig, model_config: Any
) -> None:
    """Checks a model that was built and has not read its weights.

    Raises:
        MoEPrefetchError: the slots do not reach every layer, or would be read past
            their tables.
    """
    experts = [
        module for module in model.modules() if isinstance(module, RoutedExperts)
    ]
    missed = [layer for layer in experts if not isinstance(layer, ExpertSlotsMixin)]
    if missed:
        raise MoEPrefetchError(
            f"--moe-gpu-prefetch {config.slots}: {len(missed)} of {len(experts)} MoE "
            f"layers of {type(model).__name__} ({model_config.model}) cannot be put "
            f"into slots: {missed[0].layer_name} is run by a class of the model's own "
            f"around {type(missed[0]).__name__}. Serve it without --moe-gpu-prefetch."
        )
    if not any(layer.awaits_slots for layer in experts):  # all are stock's
        return
    for name, module in model.named_modules():
        if reason := decode_objection(module):
            raise cannot_serve(name, module, reason)


def report(
    model: torch.nn.Module,
    config: MoEPrefetchConfig,
    model_config: Any,
    pipeline_stages: int,
) -> None:
    """Checks a loaded model and logs the one line that says what its slots cost.

    Raises:
        MoEPrefetchError: a layer got no slots.
    """
    experts = [
        module for module in model.modules() if isinstance(module, RoutedExperts)
    ]
    unmade = [layer for layer in experts if layer.awaits_slots]
    slotted = slotted_layers(model.modules())
    if unmade:
        method = unmade[0].quant_method.process_weights_after_loading
        raise MoEPrefetchError(
            f"--moe-gpu-prefetch {config.slots}: {len(unmade)} of {len(experts)} MoE "
            "layers got no slots, because "
            f"{type(unmade[0].quant_method).__name__}.process_weights_after_loading "
            "was replaced, or never called "
            f"({method.__module__}.{method.__qualname__}). Disable the other plugin "
            "with VLLM_PLUGINS, or serve without --moe-gpu-prefetch."
        )
    if slotted:
        first = slotted[0]
        slots = sum(layer.slots.rows.slot_bytes for layer in slotted)
        logger.info(
            "Expert slots: %d MoE layers, %d experts top-%d, %d slots each (%s): "
            "%.3f GiB of slots and %.3f GiB of staging for all on %s, %.3f GiB of "
            "experts in host memory, %d bytes per expert. About %d concurrent "
            "sequences keep their experts resident.",
            len(slotted),
            first.local_num_experts,
            first.top_k,
            first.num_slots,
            config.policy,
            slots / GIB,
            first.slots.rows.memory.staging / GIB,
            first.moe_config.device,
            sum(layer.slots.store.num_bytes for layer in slotted) / GIB,
            first.slots.store.bytes_per_expert,
            resident_sequences(first.local_num_experts, first.routed, first.num_slots),
        )
    elif not experts and experts_elsewhere(model, model_config):
        raise bypassed(f"{type(model).__name__} ({model_config.model})", config.slots)
    elif not experts and model_config.runner_type == "draft":
        logger.info(
            "The draft %s has no MoE layer, and so no slots.", model_config.model
        )
    elif not experts and pipeline_stages > 1:
        logger.info("This pipeline stage has no MoE layer, and so no slots.")
    elif not experts:
        logger.info(
            "--moe-gpu-prefetch %s is ignored: %s has no MoE layer.",
            config.slots,
            model_config.model,
        )


def _device_use(vllm_config: Any) -> DeviceUse | None:
    """This worker's GPU now; None on the CPU platform, and where the GPU's memory is
    the host's, whose free memory changes with everything that the machine does."""
    if not current_platform.is_cuda():
        return None
    if current_platform.is_integrated_gpu(torch.accelerator.current_device_index()):
        return None
    now = MemorySnapshot()
    # Torch knows nothing of the rows: they are the driver's.
    memories = {layer.slots.rows.memory for layer in all_slotted_layers(vllm_config)}
    held = now.torch_memory + sum(memory.committed for memory in memories)
    return DeviceUse(now.total_memory, now.free_memory, held)


def report_link(model: torch.nn.Module) -> None:
    """Measures the link to this worker's GPU and logs what misses take on it."""
    slotted = slotted_layers(model.modules())
    if not slotted or not current_platform.is_cuda():
        return
    copies = [copy for layer in slotted for copy in staging_copies(layer.slots.rows)]
    bandwidth = measured_bandwidth(copies)
    if bandwidth is None:
        return
    cost = link_cost(
        bandwidth,
        (
            (
                layer.local_num_experts,
                layer.routed,
                layer.num_slots,
                layer.slots.store.bytes_per_expert,
            )
            for layer in slotted
        ),
    )
    logger.info("%s", cost.sentence())
    if warning := cost.warning():
        logger.warning("%s", warning)


@contextmanager
def _checking(
    loader: BaseModelLoader, config: MoEPrefetchConfig, attached: bool
) -> Iterator[None]:
    """Within, `loader` checks a model before and after it reads its weights: before
    they are processed, so that an incomplete checkpoint becomes no shared store."""
    load_weights = loader.load_weights

    def check_then_load(model: torch.nn.Module, model_config: Any) -> None:
        check_built(model, config, model_config)
        # An attached store is whole, and the layers drop what they are handed.
        layers = (
            []
            if attached
            else [m for m in model.modules() if isinstance(m, ExpertSlotsMixin)]
        )
        with watching(
            [m.load_coverage for m in layers if m.load_coverage and m.awaits_slots]
        ):
            load_weights(model, model_config)

    loader.load_weights = check_then_load  # type: ignore[method-assign]
    try:
        yield
    finally:
        del loader.load_weights


def load_into_slots(
    load_model: Callable[[], torch.nn.Module],
    loader: BaseModelLoader,
    vllm_config: Any,
    model_config: Any,
    config: MoEPrefetchConfig,
) -> torch.nn.Module:
    """Loads a model by `load_model`, stock's, with its experts in slots.

    Raises:
        MoEPrefetchError: the slots did not reach every layer, or the checkpoint is
            incomplete.
    """
    if config.warm_start is not None:
        make_place(Path(config.warm_start), WARM_START)
        _files_of(loader, vllm_config, model_config, WARM_START)
    before = _device_use(vllm_config)
    draft = building(draft=model_config.runner_type == "draft")
    with (
        layers.in_place(),
        draft,
        _store_for(loader, vllm_config, model_config, config) as store,
    ):
        attached = store is not None and store.ready
        reading = nullcontext() if attached else reading_in_windows()
        with loading_into(store), reading, _checking(loader, config, attached):
            model = load_model()
    report(
        model, config, model_config, vllm_config.parallel_config.pipeline_parallel_size
    )
    after = _device_use(vllm_config)
    if before and after and (warning := shortfall(before, after)):
        logger.warning("%s", warning)
    if model_config.runner_type != "draft":
        report_link(model)
    guard_worker()
    return model


_REFUSED_CALLS = {
    "reload_weights": "the experts in host memory are never written after loading",
    "reset_weights": "the experts in host memory are never written after loading",
    "compute_weight_checksums": "a slotted layer's parameters are not the model's",
    "save_tensorized_model": "a slotted layer's parameters are not the model's",
}
"""Methods of vLLM's worker that take parameters for the model, and why slots refuse
them. (Saving a sharded state asks each layer, which refuses:
`ExpertSlotsMixin._save_to_state_dict`.)"""


_KEEPER = "expert_residents_keeper"
"""Attribute of a worker: its `ResidentsKeeper`, with a warm start."""


def _residents_file(vllm_config: Any) -> ResidentsFile | None:
    """Where this worker's residents are kept between starts, if that was asked for."""
    config = MoEPrefetchConfig.from_additional_config(vllm_config.additional_config)
    if config is None or config.warm_start is None:
        return None
    identity = residents_identity(vllm_config, get_world_group().rank)
    return ResidentsFile(Path(config.warm_start), identity)


@functools.cache
def guard_worker() -> None:
    """Wraps methods of the worker that holds slots. Called in workers only, once they
    have imported what is wrapped.

    What warm-up batches loaded and counted is undone, so that the first request finds
    the slots as loading left them, or as an earlier engine did (`warm_start.py`); and
    what takes parameters for the model is refused before anything has changed.
    """
    for name in _REFUSED_CALLS:
        require(f"vllm.v1.worker.gpu_worker:Worker.{name}")
    from vllm.v1.worker.gpu_worker import Worker

    warm = Worker
    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker

        warm = CPUWorker
    require(f"{warm.__module__}:{warm.__name__}.compile_or_warm_up_model")
    warm_up = warm.compile_or_warm_up_model

    @functools.wraps(warm_up)
    def warm_up_and_reset(self: Worker) -> Any:
        times = warm_up(self)
        managers = {
            layer.layer_name: layer.slots
            for layer in all_slotted_layers(self.vllm_config)
        }
        file = _residents_file(self.vllm_config) if managers else None
        start = file.read(managers) if file is not None else {}
        for name, manager in managers.items():
            manager.reset(start.get(name))
        if file is not None:
            setattr(self, _KEEPER, ResidentsKeeper(file, managers))
        return times

    require("vllm.v1.worker.gpu_worker:Worker.shutdown")
    end = Worker.shutdown

    @functools.wraps(end)
    def write_and_end(self: Worker) -> None:
        if (keeper := getattr(self, _KEEPER, None)) is not None:
            keeper.close()
        end(self)

    wrapping.install(
        wrapping.Wrap(warm, "compile_or_warm_up_model", warm_up_and_reset),
        wrapping.Wrap(Worker, "shutdown", write_and_end),
        *(
            wrapping.Wrap(Worker, name, _refusing(getattr(Worker, name)))
            for name in _REFUSED_CALLS
        ),
    )


def _refusing(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of the worker, refused where there are slots."""

    @functools.wraps(method)
    def unless_slotted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if all_slotted_layers(self.vllm_config):
            raise MoEPrefetchError(
                f"{method.__name__} cannot be called with expert slots: "
                f"{_REFUSED_CALLS[method.__name__]}. Nothing was changed. Start a "
                "server with other weights, or serve without --moe-gpu-prefetch."
            )
        return method(self, *args, **kwargs)

    return unless_slotted
