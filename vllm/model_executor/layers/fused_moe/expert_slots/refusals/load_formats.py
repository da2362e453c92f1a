# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a load format means for experts in slots."""

from typing import Any

from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

EVERY_TENSOR = {
    "auto",
    "hf",
    "safetensors",
    "pt",
    "npcache",
    "mistral",
    "runai_streamer",
}
"""Formats that read every tensor of a checkpoint."""

UNTESTED = {
    "fastsafetensors",
    "instanttensor",
    "ipc_cache",
    "runai_streamer_sharded",
    "sharded_state",
}
"""Formats that read to the GPU, where the experts are not, or into parameters as
another engine saved them."""


def asked_for(arguments: Any) -> list[str]:
    """The load formats of the model and of its draft, in lower case, as vLLM reads
    them.

    Args:
        arguments: an `EngineArgs`.
    """
    draft = (arguments.speculative_config or {}).get("draft_load_config") or {}
    if not isinstance(draft, dict):
        draft = vars(draft)
    formats = (arguments.load_format, draft.get("load_format", "auto"))
    return [str(load_format).lower() for load_format in formats]


def brings_every_tensor(load_format: object) -> bool:
    """Whether a tensor that was not read is missing from the checkpoint."""
    return str(load_format) in EVERY_TENSOR


def passes_the_layers_by(load_format: str) -> bool:
    """Whether its loader has a `load_model` of its own, which the slots do not see."""
    loader = _LOAD_FORMAT_TO_MODEL_LOADER.get(load_format, BaseModelLoader)
    return loader.load_model is not BaseModelLoader.load_model


def is_untested(load_format: str) -> bool:
    """Whether no test shows that it brings the experts to host memory unchanged."""
    return load_format in UNTESTED
