# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What expert slots cannot be combined with: each by name, with the reason and the way
out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.platforms import current_platform

from vllm.model_executor.layers.fused_moe.expert_slots.config import (
    MoEPrefetchConfig,
    MoEPrefetchError,
)
from vllm.plugins.moe_gpu_prefetch.stock.check import objection

_NOT_EXPERTS = {
    "attn",
    "attention",
    "self_attn",
    "linear_attn",
    "mamba",
    "embed_tokens",
    "lm_head",
}
"""Parts of parameter names that no routed expert has."""


@dataclass(frozen=True)
class Conflict:
    """Refused as "`option`: `reason`; `way_out`." where `present` is true of the
    arguments, which `option`, a format string, may name as {0}."""

    option: str
    present: Callable[[EngineArgs], Any]
    reason: str
    way_out: str = "drop one of the two"


def _offloads_experts(active: bool, segments: set[str] | None) -> bool:
    return active and not (segments and set(segments) <= _NOT_EXPERTS)


_UNSHOWN_FORMATS = {
    "fastsafetensors",
    "instanttensor",
    "ipc_cache",
    "runai_streamer_sharded",
    "sharded_state",
}
"""They read to the GPU, where the experts are not, or into parameters as an engine left
them."""


def _fills_the_model_itself(load_format: str) -> bool:
    loader = _LOAD_FORMAT_TO_MODEL_LOADER.get(load_format, BaseModelLoader)
    return loader.load_model is not BaseModelLoader.load_model


def _load_formats(arguments: EngineArgs) -> list[str]:
    """The model's and its draft's, as vLLM will read them: in lower case."""
    draft = (arguments.speculative_config or {}).get("draft_load_config") or {}
    if not isinstance(draft, dict):
        draft = vars(draft)
    return [
        str(f).lower()
        for f in (arguments.load_format, draft.get("load_format", "auto"))
    ]


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
        lambda arguments: (
            arguments.enable_expert_parallel and current_platform.is_cpu()
        ),
        "stock's CPU kernels take no expert map, and stock itself ends at the first "
        "request",
        "use --tensor-parallel-size alone",
    ),
    Conflict(
        "--data-parallel-size above 1",
        lambda arguments: arguments.data_parallel_size > 1,
        "ranks hand each other their tokens behind the slots, which is not shown to be "
        "exact",
        "start one server a replica; they can share one host copy of the experts "
        "(--moe-gpu-prefetch-config.shared_store)",
    ),
    Conflict(
        "--prefill-context-parallel-size above 1",
        lambda arguments: arguments.prefill_context_parallel_size > 1,
        "ranks hand each other their tokens behind the slots, which is not shown to be "
        "exact",
        "use --tensor-parallel-size",
    ),
    Conflict(
        "--enable-dbo",
        lambda arguments: arguments.enable_dbo or arguments.ubatch_size > 1,
        "two micro-batches would change the same slots at the same time",
    ),
    Conflict(
        "--enable-lora",
        lambda arguments: arguments.enable_lora,
        "adapters are indexed by expert id, the kernel gets row numbers",
    ),
    Conflict(
        "--enable-sleep-mode",
        lambda arguments: arguments.enable_sleep_mode,
        "the slots would be dropped or moved under their tables",
    ),
    Conflict(
        "decode_backend in --additional-config",
        lambda arguments: (
            (arguments.additional_config or {}).get("decode_backend", "auto") != "auto"
        ),
        "a model's own decode kernels read the experts' weights by expert id",
    ),
    Conflict(
        "--weight-transfer-config",
        lambda arguments: arguments.weight_transfer_config is not None,
        "the experts in host memory are never written after loading",
    ),
    Conflict(
        "--load-format {0.load_format} (or its draft's)",
        lambda arguments: any(map(_fills_the_model_itself, _load_formats(arguments))),
        "its loader fills the model behind the layers' backs",
        "use --load-format auto",
    ),
    Conflict(
        "--load-format {0.load_format} (or its draft's)",
        lambda arguments: not _UNSHOWN_FORMATS.isdisjoint(_load_formats(arguments)),
        "it is not shown to bring the experts to host memory unchanged",
        "use --load-format auto",
    ),
    Conflict(
        "--cpu-offload-gb on the experts",
        lambda arguments: _offloads_experts(
            arguments.cpu_offload_gb > 0, arguments.cpu_offload_params
        ),
        "a tensor cannot have two owners",
        "name other weights with --cpu-offload-params "
        f"({', '.join(sorted(_NOT_EXPERTS))})",
    ),
    Conflict(
        "--offload-group-size on the experts",
        lambda arguments: _offloads_experts(
            arguments.offload_group_size > 0, arguments.offload_params
        ),
        "a tensor cannot have two owners",
        f"name other weights with --offload-params ({', '.join(sorted(_NOT_EXPERTS))})",
    ),
)


def refuse(arguments: EngineArgs) -> None:
    """Refuses, before anything starts, what expert slots cannot be combined with.

    Raises:
        MoEPrefetchError: names the combination, the reason and the way out.
    """
    config = MoEPrefetchConfig.from_additional_config(arguments.additional_config)
    if config is None:
        return
    if reason := objection():
        raise MoEPrefetchError(reason)
    for conflict in CONFLICTS:
        if conflict.present(arguments):
            raise MoEPrefetchError(
                "--moe-gpu-prefetch cannot be combined with "
                f"{conflict.option.format(arguments)}: {conflict.reason}; "
                f"{conflict.way_out}."
            )


def refuse_draft_slots(config: MoEPrefetchConfig, vllm_config: VllmConfig) -> None:
    """Refuses slots of a draft where no model drafts.

    Raises:
        MoEPrefetchError: says what drafts instead.
    """
    if config.draft_slots is None:
        return
    given = (
        f"--moe-gpu-prefetch-config.draft_slots {config.draft_slots} was given without "
        f"a draft"
    )
    speculation = vllm_config.speculative_config
    if speculation is None:
        raise MoEPrefetchError(f"{given}. Add --speculative-config, or drop it.")
    # For a method without a draft model, vLLM has none here, or the model's own
    # configuration.
    draft = speculation.draft_model_config
    if draft is None or draft.runner_type != "draft":
        raise MoEPrefetchError(
            f"{given}: speculative decoding by {speculation.method} has no draft "
            f"model. Drop it."
        )


def bypassed(model: str, slots: int | str) -> MoEPrefetchError:
    """What to say of a MoE model without a fused-MoE layer."""
    return MoEPrefetchError(
        f"--moe-gpu-prefetch {slots}: {model} is a MoE model whose experts do not go "
        "through vLLM's fused-MoE layer, so they cannot be put into slots. Serve it "
        "without --moe-gpu-prefetch."
    )
