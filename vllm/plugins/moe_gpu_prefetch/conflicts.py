# SPDX-License-Identifier: Apache-2.0
"""What expert slots cannot be combined with: each by name, with the reason and the way out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.platforms import current_platform

from vllm.model_executor.layers.fused_moe.expert_slots.config import (
    MoEPrefetchConfig,
    MoEPrefetchError,
)
from vllm.plugins.moe_gpu_prefetch.compatibility import objection

_EXPERT_PARAMETER = ".mlp.experts.routed_experts.w13_weight.w2_weight."


@dataclass(frozen=True)
class Conflict:
    """Refused as "`option`: `reason`; `way_out`." where `present` is true of the arguments, which
    `option`, a format string, may name as {0}."""

    option: str
    present: Callable[[EngineArgs], Any]
    reason: str
    way_out: str = "drop one of the two"


def _offloads_experts(active: bool, segments: set[str] | None) -> bool:
    return active and (not segments or any(f".{s}." in _EXPERT_PARAMETER for s in segments))


_UNSHOWN_FORMATS = {
    "fastsafetensors",
    "instanttensor",
    "ipc_cache",
    "runai_streamer_sharded",
    "sharded_state",
}
"""They read to the GPU, where the experts are not, or into parameters as an engine left them."""


def _fills_the_model_itself(load_format: str) -> bool:
    loader = _LOAD_FORMAT_TO_MODEL_LOADER.get(load_format, BaseModelLoader)
    return loader.load_model is not BaseModelLoader.load_model


CONFLICTS = (
    Conflict(
        "--enable-eplb",
        lambda arguments: arguments.enable_eplb,
        "EPLB moves experts between ranks under the slots' tables",
    ),
    Conflict(
        "--enable-elastic-ep",
        lambda arguments: arguments.enable_elastic_ep,
        "it moves experts between ranks under the slots' tables",
    ),
    Conflict(
        "--enable-expert-parallel on the CPU",
        lambda arguments: arguments.enable_expert_parallel and current_platform.is_cpu(),
        "stock's CPU kernels take no expert map, and stock itself ends at the first request",
        "use --tensor-parallel-size alone",
    ),
    Conflict(
        "--data-parallel-size above 1",
        lambda arguments: arguments.data_parallel_size > 1,
        "ranks hand each other their tokens behind the slots, which is not shown to be exact",
        "start one server a replica; they can share one host copy of the experts "
        "(--moe-gpu-prefetch-config.shared_store)",
    ),
    Conflict(
        "--prefill-context-parallel-size above 1",
        lambda arguments: arguments.prefill_context_parallel_size > 1,
        "ranks hand each other their tokens behind the slots, which is not shown to be exact",
        "use --tensor-parallel-size",
    ),
    Conflict(
        "--enable-dbo",
        lambda arguments: arguments.enable_dbo or arguments.ubatch_size > 1,
        "two batches would plan the same slots at a time",
    ),
    Conflict(
        "--enable-lora",
        lambda arguments: arguments.enable_lora,
        "adapters are indexed by expert id, the kernel gets slot numbers",
    ),
    Conflict(
        "--enable-sleep-mode",
        lambda arguments: arguments.enable_sleep_mode,
        "the slots would be dropped or moved under their tables",
    ),
    Conflict(
        "--weight-transfer-config",
        lambda arguments: arguments.weight_transfer_config is not None,
        "the experts in host memory are never written after loading",
    ),
    Conflict(
        "--load-format {0.load_format}",
        lambda arguments: _fills_the_model_itself(arguments.load_format),
        "its loader fills the model behind the layers' backs",
        "use --load-format auto",
    ),
    Conflict(
        "--load-format {0.load_format}",
        lambda arguments: arguments.load_format in _UNSHOWN_FORMATS,
        "it is not shown to bring the experts to host memory unchanged",
        "use --load-format auto",
    ),
    Conflict(
        "--cpu-offload-gb on the experts",
        lambda arguments: _offloads_experts(
            arguments.cpu_offload_gb > 0, arguments.cpu_offload_params
        ),
        "a tensor cannot have two owners",
        "name other weights with --cpu-offload-params",
    ),
    Conflict(
        "--offload-group-size on the experts",
        lambda arguments: _offloads_experts(
            arguments.offload_group_size > 0, arguments.offload_params
        ),
        "a tensor cannot have two owners",
        "name other weights with --offload-params",
    ),
)


def slots_wanted(arguments: EngineArgs) -> bool:
    """Whether these arguments ask for expert slots."""
    return MoEPrefetchConfig.from_additional_config(arguments.additional_config) is not None


def refuse(arguments: EngineArgs) -> None:
    """Refuses, before anything starts, what expert slots cannot be combined with.

    Raises:
        MoEPrefetchError: names the combination, the reason and the way out.
    """
    if not slots_wanted(arguments):
        return
    if reason := objection():
        raise MoEPrefetchError(reason)
    for conflict in CONFLICTS:
        if conflict.present(arguments):
            raise MoEPrefetchError(
                f"--moe-gpu-prefetch cannot be combined with {conflict.option.format(arguments)}: "
                f"{conflict.reason}; {conflict.way_out}."
            )
