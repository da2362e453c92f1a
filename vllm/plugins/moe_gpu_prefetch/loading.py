# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Loads a model with its experts in slots: what happens around stock's loading."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from vllm.distributed import get_world_group
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from vllm.model_executor.layers.fused_moe.expert_slots.config import (
    MoEPrefetchConfig,
    MoEPrefetchError,
)
from vllm.model_executor.layers.fused_moe.expert_slots.layer import ExpertSlotsMixin
from vllm.model_executor.layers.fused_moe.expert_slots.model_load import (
    ModelLoad,
    loading,
)
from vllm.model_executor.layers.fused_moe.expert_slots.refusals.models import (
    check_built,
    check_loaded,
)
from vllm.model_executor.layers.fused_moe.expert_slots.shared_store.identity import (
    checkpoint_directory,
    store_identity,
)
from vllm.model_executor.layers.fused_moe.expert_slots.shared_store.store import (
    SharedStore,
    shared_store,
)
from vllm.model_executor.layers.fused_moe.expert_slots.shared_store.trust import (
    make_place,
)
from vllm.model_executor.layers.fused_moe.expert_slots.warm_start import WARM_START
from vllm.model_executor.layers.fused_moe.expert_slots.weights.coverage import watching
from vllm.model_executor.layers.fused_moe.expert_slots.weights.windows import (
    reading_in_windows,
)
from vllm.plugins.moe_gpu_prefetch import registry
from vllm.plugins.moe_gpu_prefetch.guard import guard_worker
from vllm.plugins.moe_gpu_prefetch.report import (
    device_use,
    report,
    report_device_use,
    report_link,
)


def _files_of(
    loader: BaseModelLoader, vllm_config: Any, model_config: Any, option: str
) -> Path:
    """The directory of a model: its files tell the model that `option` belongs to.

    Raises:
        MoEPrefetchError: the files are not on this machine.
    """
    loader.download_model(model_config)
    directory = checkpoint_directory(vllm_config, model_config)
    if directory is None:
        raise MoEPrefetchError(
            f"--moe-gpu-prefetch-config.{option}: the files of {model_config.model} "
            "are not on this machine, so the model cannot be identified. Pass a local "
            f"model directory, or serve without {option}."
        )
    return directory


@contextmanager
def _store_for(
    loader: BaseModelLoader,
    vllm_config: Any,
    model_config: Any,
    config: MoEPrefetchConfig,
) -> Iterator[SharedStore | None]:
    """The shared store of this model and rank while it loads; None if none was asked
    for."""
    if config.shared_store is None:
        yield None
        return
    directory = _files_of(loader, vllm_config, model_config, "shared_store")
    rank = get_world_group().rank
    identity = store_identity(vllm_config, model_config, directory, rank)
    with shared_store(Path(config.shared_store), identity) as store:
        yield store


@contextmanager
def _checking(
    loader: BaseModelLoader, config: MoEPrefetchConfig, attached: bool
) -> Iterator[None]:
    """Within, `loader` checks a model before it reads its weights, and the weights
    before they are processed: an incomplete checkpoint must not become a shared
    store."""
    load_weights = loader.load_weights

    def check_then_load(model: torch.nn.Module, model_config: Any) -> None:
        check_built(model, config.slots, model_config.model)
        # An attached store is whole, and the layers discard what the loader reads.
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
    """Calls `load_model`, stock's, so that the model's experts end up in slots.

    Raises:
        MoEPrefetchError: the slots did not reach every layer, or the checkpoint is
            incomplete.
    """
    if config.warm_start is not None:
        # `settle` did it on the front end's machine; a worker may be on another one.
        make_place(Path(config.warm_start), WARM_START)
        _files_of(loader, vllm_config, model_config, WARM_START)
    before = device_use(vllm_config)
    with (
        registry.in_place(),
        _store_for(loader, vllm_config, model_config, config) as store,
    ):
        attached = store is not None and store.ready
        reading = nullcontext() if attached else reading_in_windows()
        load = ModelLoad(config, model_config.runner_type == "draft", store)
        with loading(load), reading, _checking(loader, config, attached):
            model = load_model()
    check_loaded(model, config.slots, model_config)
    report(
        model, config, model_config, vllm_config.parallel_config.pipeline_parallel_size
    )
    report_device_use(before, device_use(vllm_config))
    if model_config.runner_type != "draft":
        report_link(model)
    guard_worker()
    return model
