# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The worker of a slotted model: methods of vLLM's that must know of the slots."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm.distributed import get_world_group
from vllm.platforms import current_platform

from vllm.model_executor.layers.fused_moe.expert_slots.config import (
    MoEPrefetchConfig,
    MoEPrefetchError,
)
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.marlin_experts import (
    mapping_blocks,
)
from vllm.model_executor.layers.fused_moe.expert_slots.refusals import reasons
from vllm.model_executor.layers.fused_moe.expert_slots.warm_start import (
    ResidentsFile,
    ResidentsKeeper,
    residents_identity,
)
from vllm.plugins.moe_gpu_prefetch.stock import wrapping
from vllm.plugins.moe_gpu_prefetch.stock.seams import require
from vllm.plugins.moe_gpu_prefetch.tracing import start_trace
from vllm.plugins.moe_gpu_prefetch.worker import all_slotted_layers

_ROWS = "a slotted layer's parameters are rows, not the model's experts"

_REFUSED_CALLS = {
    "reload_weights": reasons.NEVER_WRITTEN,
    "reset_weights": reasons.NEVER_WRITTEN,
    "compute_weight_checksums": _ROWS,
    "save_tensorized_model": _ROWS,
}
"""Methods of vLLM's worker that treat a layer's parameters as the model's, and why
slots refuse them. (Saving a sharded state asks each layer, which refuses:
`ExpertSlotsMixin._save_to_state_dict`.)"""

_KEEPER = "expert_residents_keeper"
"""Attribute of a worker with a warm start: its `ResidentsKeeper`."""

_RECORDER = "expert_trace_recorder"
"""Attribute of a worker that records a trace: its `TraceRecorder`."""


def _residents_file(vllm_config: Any) -> ResidentsFile | None:
    """The file that keeps this worker's residents between starts, if one was asked
    for."""
    config = MoEPrefetchConfig.of(vllm_config)
    if config is None or config.warm_start is None:
        return None
    identity = residents_identity(vllm_config, get_world_group().rank)
    return ResidentsFile(Path(config.warm_start), identity)


@functools.cache
def guard_worker() -> None:
    """Wraps methods of the worker that holds slots, once in a process. Called in
    workers only: by then they have imported what is wrapped.

    The blocks of Marlin's kernel are mapped to rows (`cuda/marlin_experts.py`). After
    warm-up the slots are reset to what loading left, or to what an earlier engine left
    (`warm_start.py`), and the trace begins, if one was asked for. When the worker ends,
    its residents are written and the trace is closed. Calls that would take a layer's
    rows for the model's parameters are refused.

    Raises:
        MoEPrefetchError: this vLLM's worker lacks one of the methods.
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
            layer.layer_name: layer.slot_manager
            for layer in all_slotted_layers(self.vllm_config)
        }
        file = _residents_file(self.vllm_config) if managers else None
        start = file.read(managers) if file is not None else {}
        for name, manager in managers.items():
            manager.reset(start.get(name))
        if file is not None:
            setattr(self, _KEEPER, ResidentsKeeper(file, managers))
        if (recorder := start_trace(self, start)) is not None:
            setattr(self, _RECORDER, recorder)
        return times

    require("vllm.v1.worker.gpu_worker:Worker.shutdown")
    end = Worker.shutdown

    @functools.wraps(end)
    def write_and_end(self: Worker) -> None:
        try:
            for name in (_KEEPER, _RECORDER):
                if (writer := getattr(self, name, None)) is not None:
                    writer.close()
        finally:
            end(self)

    require(
        "vllm.model_executor.layers.fused_moe.experts.marlin_moe:moe_align_block_size"
    )
    from vllm.model_executor.layers.fused_moe.experts import marlin_moe

    align = "moe_align_block_size"
    wrapping.install(
        wrapping.Wrap(marlin_moe, align, mapping_blocks(getattr(marlin_moe, align))),
        wrapping.Wrap(warm, "compile_or_warm_up_model", warm_up_and_reset),
        wrapping.Wrap(Worker, "shutdown", write_and_end),
        *(
            wrapping.Wrap(Worker, name, _refusing(getattr(Worker, name)))
            for name in _REFUSED_CALLS
        ),
    )


def _refusing(method: Callable[..., Any]) -> Callable[..., Any]:
    """`method` of the worker, which is refused where there are slots."""

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
