# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Writes the checkpoint of a row of the matrix."""

import functools
import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from vllm.model_executor.model_loader import dummy_loader
from vllm.model_executor.models import ModelRegistry

from tests.support.architectures.model import COMMON, Architecture
from tests.support.architectures.pictures import Seeing
from tests.support.sample import make_tokenizer, write


def write_checkpoint(directory: Path, architecture: Architecture) -> Path:
    """Below `directory`; the configuration alone, where vLLM makes the weights."""
    checkpoint = directory / architecture.name
    import_class(architecture)
    if architecture.model_class is None:
        _write_configuration(checkpoint, architecture)
        return checkpoint
    given = architecture.config
    if "text_config" not in given:
        given = COMMON | given
    config = getattr(transformers, architecture.config_class)(**given)
    write(checkpoint, getattr(transformers, architecture.model_class), config)
    if isinstance(architecture, Seeing):
        architecture.processor(architecture.tokenizer()).save_pretrained(checkpoint)
    if architecture.left_out or architecture.transposed:
        (weights,) = checkpoint.glob("*.safetensors")
        save_file(_as_published(weights, architecture), weights, {"format": "pt"})
    if architecture.published:
        path = checkpoint / "config.json"
        published = json.loads(path.read_text()) | {
            "architectures": [architecture.published]
        }
        path.write_text(json.dumps(published))
    return checkpoint


def _as_published(weights: Path, architecture: Architecture) -> dict[str, torch.Tensor]:
    found = {}
    for name, tensor in load_file(weights).items():
        if architecture.left_out and re.search(architecture.left_out, name):
            continue
        if architecture.transposed and re.search(architecture.transposed, name):
            tensor = tensor.transpose(1, 2).contiguous()
        found[name] = tensor
    return found


def import_class(architecture: Architecture) -> None:
    """vLLM would look at each class in a process of its own, which takes longer than
    all of its runs."""
    for name in (architecture.name, "TransformersMoEForCausalLM"):
        if name in ModelRegistry.models:
            model = ModelRegistry.models[name].load_model_cls()
            ModelRegistry.register_model(name, model)
            return


def _write_configuration(checkpoint: Path, architecture: Architecture) -> None:
    tokenizer = make_tokenizer()
    config = COMMON | architecture.config
    name = config["model_type"]
    try:
        transformers.AutoConfig.for_model(name)
    except ValueError:  # published with code of its own for the configuration
        own = type(name, (transformers.PreTrainedConfig,), {"model_type": name})
        transformers.AutoConfig.register(name, own)
    tokenizer.save_pretrained(checkpoint)
    described = {
        "architectures": [architecture.name],
        "eos_token_id": tokenizer.eos_token_id,
        **config,
    }
    (checkpoint / "config.json").write_text(json.dumps(described))


def make_dummies_large(patch: pytest.MonkeyPatch) -> None:
    """The weights that vLLM makes are so small that a model's answers would not depend
    on its experts."""
    fill = dummy_loader.initialize_single_dummy_weight
    large = functools.partial(fill, low=-0.2, high=0.2)
    patch.setattr(dummy_loader, "initialize_single_dummy_weight", large)
