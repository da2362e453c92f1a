# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The identity of a host store: the checkpoint, the rank's layout, and the versions of
the software that processed one for the other. The warm start uses a part of it."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
)
from vllm.config import ModelConfig, VllmConfig
from vllm.platforms import current_platform

import vllm
from vllm import envs

_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth"}


def checkpoint_directory(
    vllm_config: VllmConfig, model_config: ModelConfig
) -> Path | None:
    """The directory of a model's files on this machine; None if they are not here."""
    directory = Path(model_config.model)
    if directory.is_dir():
        return directory
    try:
        return Path(
            snapshot_download(
                model_config.model,
                revision=model_config.revision,
                cache_dir=vllm_config.load_config.download_dir,
                local_files_only=True,
            )
        )
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError):
        return None


def store_identity(
    vllm_config: VllmConfig, model_config: ModelConfig, directory: Path, rank: int
) -> dict[str, Any]:
    """Everything that determines the bytes of one rank's host store, as JSON.

    Weight files are told apart by name, size and time of the last change, configuration
    files by content. Settings that do not change an expert (`max_model_len`, the number
    of slots) are left out.

    Args:
        directory: of the model's files.
        rank: in vLLM's world group.
    """
    parallel = vllm_config.parallel_config
    weights = []
    configuration = blake3(_canonical(model_config.hf_config.to_dict()).encode())
    for path in sorted(directory.iterdir()):
        if path.suffix in _WEIGHTS:
            status = path.stat()
            weights.append([path.name, status.st_size, status.st_mtime_ns])
        elif path.suffix == ".json":
            configuration.update(path.name.encode() + path.read_bytes())
    return {
        "model": model_config.model,
        "weights": weights,
        "configuration": configuration.hexdigest(),
        "model_impl": str(model_config.model_impl),
        "quantization": str(model_config.quantization),
        "dtype": str(model_config.dtype),
        "load_format": str(vllm_config.load_config.load_format),
        "rank": rank,
        "tensor_parallel_size": parallel.tensor_parallel_size,
        "pipeline_parallel_size": parallel.pipeline_parallel_size,
        "expert_parallel": [
            parallel.enable_expert_parallel,
            parallel.expert_placement_strategy,
        ],
        "platform": f"{current_platform.device_name} "
        + torch.backends.cpu.get_cpu_capability(),
        # Kernels differ in the layout of processed experts, and GPUs in their kernels.
        "compute_capability": str(current_platform.get_device_capability()),
        "moe_backend": str(vllm_config.kernel_config.moe_backend),
        "batch_invariant": bool(envs.VLLM_BATCH_INVARIANT),
        "versions": {
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "vllm-moe-gpu-prefetch": version("vllm-moe-gpu-prefetch"),
        },
    }


def _canonical(value: Any) -> str:
    """JSON that is the same in every process."""

    def plain(value: Any) -> Any:
        return (
            sorted(map(str, value))
            if isinstance(value, set | frozenset)
            else str(value)
        )

    return json.dumps(value, sort_keys=True, default=plain)
