# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Arguments that expert slots cannot be combined with: each by name, with the reason
and the way out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

from vllm.model_executor.layers.fused_moe.expert_slots.config import (
    MoEPrefetchConfig,
    MoEPrefetchError,
)
from vllm.model_executor.layers.fused_moe.expert_slots.refusals import (
    load_formats,
    reasons,
)

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

_IN_HOST_MEMORY = "expert slots keep the experts in host memory already"


@dataclass(frozen=True)
class Conflict:
    """Refused as "`option`: `reason`. `way_out`." where `present` is true of the
    arguments, which `option`, a format string, may name as {0}."""

    option: str
    present: Callable[[EngineArgs], Any]
    reason: str
    way_out: str = "Drop one of the two"


def _offloads_experts(active: bool, segments: set[str] | None) -> bool:
    return active and not (segments and set(segments) <= _NOT_EXPERTS)


CONFLICTS = (
    Conflict("--enable-eplb", lambda arguments: arguments.enable_eplb, reasons.EPLB),
    Conflict(
        "--enable-elastic-ep",
        lambda arguments: arguments.enable_elastic_ep,
        "it moves experts between ranks, and the slots' tables would not follow",
    ),
    Conflict(
        "--enable-expert-parallel on the CPU",
        lambda arguments: (
            arguments.enable_expert_parallel and current_platform.is_cpu()
        ),
        f"{reasons.NO_EXPERT_MAP}, and stock itself ends at the first request",
        "Use --tensor-parallel-size alone",
    ),
    Conflict(
        "--data-parallel-size above 1",
        lambda arguments: arguments.data_parallel_size > 1,
        reasons.DATA_PARALLEL,
        "Start one server per replica; the servers can share one host copy of the "
        "experts (--moe-gpu-prefetch-config.shared_store)",
    ),
    Conflict(
        "--prefill-context-parallel-size above 1",
        lambda arguments: arguments.prefill_context_parallel_size > 1,
        reasons.CONTEXT_PARALLEL,
        "Use --tensor-parallel-size",
    ),
    Conflict(
        "--enable-dbo",
        lambda arguments: arguments.enable_dbo or arguments.ubatch_size > 1,
        "two micro-batches would change the same slots at the same time",
    ),
    Conflict("--enable-lora", lambda arguments: arguments.enable_lora, reasons.LORA),
    Conflict(
        "--enable-sleep-mode",
        lambda arguments: arguments.enable_sleep_mode,
        "sleeping drops or moves the slots, and their tables would not follow",
    ),
    Conflict(
        "decode_backend in --additional-config",
        lambda arguments: (
            (arguments.additional_config or {}).get("decode_backend", "auto") != "auto"
        ),
        reasons.OWN_DECODE,
    ),
    Conflict(
        "--weight-transfer-config",
        lambda arguments: arguments.weight_transfer_config is not None,
        reasons.NEVER_WRITTEN,
    ),
    Conflict(
        "--load-format {0.load_format} (or its draft's)",
        lambda arguments: any(
            map(load_formats.passes_the_layers_by, load_formats.asked_for(arguments))
        ),
        "this loader writes weights without calling the layers' weight loaders, so the "
        "experts cannot be kept in host memory",
        "Use --load-format auto",
    ),
    Conflict(
        "--load-format {0.load_format} (or its draft's)",
        lambda arguments: any(
            map(load_formats.is_untested, load_formats.asked_for(arguments))
        ),
        "no test shows that this loader brings the experts to host memory unchanged",
        "Use --load-format auto",
    ),
    Conflict(
        "--cpu-offload-gb on the experts",
        lambda arguments: _offloads_experts(
            arguments.cpu_offload_gb > 0, arguments.cpu_offload_params
        ),
        _IN_HOST_MEMORY,
        "Name other weights with --cpu-offload-params "
        f"({', '.join(sorted(_NOT_EXPERTS))})",
    ),
    Conflict(
        "--offload-group-size on the experts",
        lambda arguments: _offloads_experts(
            arguments.offload_group_size > 0, arguments.offload_params
        ),
        _IN_HOST_MEMORY,
        f"Name other weights with --offload-params ({', '.join(sorted(_NOT_EXPERTS))})",
    ),
)


def refuse(arguments: EngineArgs) -> None:
    """Refuses, before anything starts, what expert slots cannot be combined with.

    Raises:
        MoEPrefetchError: names the combination, the reason and the way out.
    """
    for conflict in CONFLICTS:
        if conflict.present(arguments):
            raise MoEPrefetchError(
                "--moe-gpu-prefetch cannot be combined with "
                f"{conflict.option.format(arguments)}: {conflict.reason}. "
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
        "a draft"
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
            "model. Drop it."
        )
