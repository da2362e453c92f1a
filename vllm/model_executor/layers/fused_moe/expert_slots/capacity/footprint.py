# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Measures a model from its configuration alone, in a process of its own.

Building a model leaves traces (registered layers, cached rotary embeddings, a CUDA
context) and needs parallel groups that do not exist yet.
"""

import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.utils.system_utils import get_mp_context

from vllm.model_executor.layers.fused_moe.expert_slots.backend import current_backend
from vllm.model_executor.layers.fused_moe.expert_slots.capacity.gpus import (
    GpuMemory,
    smallest_gpu,
)
from vllm.model_executor.layers.fused_moe.expert_slots.capacity.plan import Footprint
from vllm.model_executor.layers.fused_moe.expert_slots.capacity.stage import (
    measure_stage,
)
from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError
from vllm.plugins import load_general_plugins

_LIMIT_S = 180


class CannotMeasure(MoEPrefetchError):
    """vLLM cannot build the model from its configuration alone; carries its error."""


@dataclass(frozen=True)
class Measurement:
    """What is known of a model and of this machine before anything is started.

    Attributes:
        footprints: of each pipeline stage.
        objection: why layers of the model cannot have slots, or None.
        bypassing: a parameter of routed experts outside vLLM's fused-MoE layers, or
            None.
        gpu: None on the CPU platform, and for a question about a GPU elsewhere.
    """

    footprints: tuple[Footprint, ...]
    objection: str | None
    bypassing: str | None
    gpu: GpuMemory | None


def measure(
    vllm_config: VllmConfig, elsewhere: Callable[[], None] | None = None
) -> Measurement:
    """Measures a model from its configuration alone, and the GPUs that it is to run on.

    Args:
        elsewhere: for a question about another machine's GPU, what makes the measuring
            process answer for that GPU.

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
            "script that starts engines must do so under if __name__ == '__main__')"
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
    again. For GPUs of this machine vLLM decides, because a process that has initialised
    CUDA, or runs on Ray or WSL2, cannot be forked."""
    if elsewhere or current_platform.is_cpu():
        return multiprocessing.get_context("fork")
    return get_mp_context()


def _measure_and_send(
    vllm_config: VllmConfig, elsewhere: Callable[[], None] | None, sender: Connection
) -> None:
    # OpenMP does not survive a fork. Not torch.set_num_threads: vLLM's CPU worker shuts
    # that off.
    torch._C.set_num_threads(1)
    # A spawned process has loaded no plugin, and another plugin may bring the model.
    load_general_plugins()
    try:
        sender.send(_measure(vllm_config, elsewhere))
    except MoEPrefetchError as error:
        sender.send(error)
    except Exception as error:
        # `traceback` would walk all errors behind this one, which takes minutes after a
        # deep recursion.
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
        gpu = smallest_gpu(parallel)
    stages = [
        measure_stage(vllm_config, stage, backend)
        for stage in range(parallel.pipeline_parallel_size)
    ]
    footprints, objections, parameters = zip(*stages, strict=True)
    return Measurement(
        footprints,
        next(filter(None, objections), None),
        next(filter(None, parameters), None),
        gpu,
    )
