# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Makes small quantised checkpoints as people's tools write them, and each one's twin:
the same model with the same values in bfloat16.

Attention, router and lm_head stay unquantised, as vLLM has no CPU kernel for most of
them. A twin lets a test see that a format was read right, and not the same wrong way
twice.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import GptOssConfig, GptOssForCausalLM

from tests.support import packing
from tests.support.packing import GROUP, Quantised
from tests.support.sample import COMMON, make_checkpoint, write

EXPERTS, TOP_K, LAYERS = 16, 2, 2
HIDDEN, WIDTH = 256, 512
"""Of an expert: multiples of 256, which stock's kernels want, and not the same."""

WEIGHTS = 3 * HIDDEN * WIDTH
"""Of an expert."""

EXPERT = re.compile(r"\.experts\..*_proj(\.weight)?$")
"""Names of matrices to be quantised."""


@dataclass(frozen=True)
class Format:
    """How one matrix is quantised, what config.json says of it, and an expert's bytes
    in the checkpoint."""

    quantise: Callable[[torch.Tensor], Quantised]
    config: dict[str, Any]
    bytes_per_expert: int


def _compressed(layout: str, weights: dict[str, Any], activations: Any) -> Any:
    common = {"type": "int", "actorder": None, "observer": "minmax"}
    group = {
        "targets": ["Linear"],
        "weights": common | {"dynamic": False} | weights,
        "input_activations": activations,
        "output_activations": None,
        "format": layout,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*self_attn.*", r"re:.*mlp\.gate$"],
    }


_KEPT = [
    "lm_head",
    *(
        f"model.layers.{layer}.{name}"
        for layer in range(LAYERS)
        for name in ("mlp.gate", *(f"self_attn.{part}_proj" for part in "qkvo"))
    ),
]
_INT8 = {"num_bits": 8, "strategy": "channel", "symmetric": True}
_TOKENS = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True}
_INT4 = {"num_bits": 4, "strategy": "group", "group_size": GROUP}
_GPTQ = {"bits": 4, "group_size": GROUP, "sym": True, "desc_act": False}
_SCALES, _ZEROS, _SHAPES = WEIGHTS // GROUP * 2, WEIGHTS // GROUP // 2, 3 * 2 * 8

FORMATS = {
    "fp8-block": Format(
        packing.fp8_block,
        {
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "modules_to_not_convert": _KEPT,
        },
        WEIGHTS + WEIGHTS // 128**2 * 4,
    ),
    "int8": Format(
        packing.int8,
        _compressed("int-quantized", _INT8, _TOKENS | {"dynamic": True}),
        WEIGHTS + (2 * WIDTH + HIDDEN) * 2,
    ),
    "int4-ct": Format(
        packing.int4,
        _compressed("pack-quantized", _INT4 | {"symmetric": True}, None),
        WEIGHTS // 2 + _SCALES + _SHAPES,
    ),
    "int4-ct-asym": Format(
        packing.int4_zero,
        _compressed("pack-quantized", _INT4 | {"symmetric": False}, None),
        WEIGHTS // 2 + _SCALES + _ZEROS + _SHAPES,
    ),
    "gptq": Format(
        packing.gptq,
        {
            "quant_method": "gptq",
            "checkpoint_format": "gptq",
            "lm_head": False,
            "dynamic": {r"-:.*self_attn.*": {}, r"-:.*mlp\.gate$": {}},
            **_GPTQ,
        },
        WEIGHTS // 2 + _SCALES + _ZEROS + (2 * HIDDEN + WIDTH) * 4,
    ),
    "awq": Format(
        packing.awq,
        {
            "quant_method": "awq",
            "version": "gemm",
            "bits": 4,
            "group_size": GROUP,
            "zero_point": True,
            "modules_to_not_convert": ["self_attn", "mlp.gate", "lm_head"],
        },
        WEIGHTS // 2 + _SCALES + _ZEROS,
    ),
    "mxfp4": Format(
        packing.mxfp4,
        {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
        },
        WEIGHTS // 2 + WEIGHTS // 32 + (2 * WIDTH + HIDDEN) * 2,
    ),
}


ON_CPU = tuple(name for name in FORMATS if name != "int4-ct-asym")
"""Those that stock's CPU classes take."""


def make_quantised(directory: Path, name: str) -> Path:
    """A Qwen3-MoE in the format `name`, a gpt-oss for "mxfp4"; does nothing where it is
    there."""
    return _make(directory, name, as_twin=False)


def make_twin(directory: Path, name: str) -> Path:
    """The same model, unquantised: bfloat16 of what the quantised values stand for."""
    return _make(directory, name, as_twin=True)


def _make(directory: Path, name: str, as_twin: bool) -> Path:
    if directory.exists():
        return directory
    unfinished = directory.with_name(f"{directory.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    _base(unfinished, name)
    tensors = {}
    for key, tensor in load_file(unfinished / "model.safetensors").items():
        if not EXPERT.search(key):
            tensors[key] = tensor
            continue
        # gpt-oss holds its unquantised matrices as [experts, in, out].
        weight = tensor.mT.contiguous() if name == "mxfp4" else tensor
        made, values = FORMATS[name].quantise(weight.float())
        if as_twin:
            values = values.mT if name == "mxfp4" else values
            tensors[key] = values.bfloat16().contiguous()
            continue
        stem = f"{key}_" if name == "mxfp4" else key.removesuffix("weight")
        tensors |= {stem + part: value for part, value in made.items()}
    save_file(tensors, unfinished / "model.safetensors", {"format": "pt"})
    if not as_twin:
        path = unfinished / "config.json"
        config = json.loads(path.read_text())
        config["quantization_config"] = FORMATS[name].config
        path.write_text(json.dumps(config, indent=2))
    unfinished.rename(directory)
    return directory


def quantise_experts(checkpoint: Path, name: str) -> None:
    """Quantises the experts of a checkpoint as published ones are, in place.

    Args:
        checkpoint: one file, with matrices EXPERT.w.weight.
        name: a format whose configuration lists what stays unquantised.
    """
    path = checkpoint / "model.safetensors"
    tensors, kept = {}, []
    for key, tensor in load_file(path).items():
        if re.search(r"\.experts\.\d+\.\w+\.weight$", key):
            made, _ = FORMATS[name].quantise(tensor.float())
            stem = key.removesuffix("weight")
            tensors |= {stem + part: value for part, value in made.items()}
            continue
        tensors[key] = tensor
        if key.endswith(".weight") and tensor.dim() == 2:
            kept.append(key.removesuffix(".weight"))
    save_file(tensors, path, {"format": "pt"})
    config = json.loads((checkpoint / "config.json").read_text())
    kept_by = {"fp8-block": "modules_to_not_convert", "int4-ct": "ignore"}[name]
    config["quantization_config"] = FORMATS[name].config | {kept_by: kept}
    (checkpoint / "config.json").write_text(json.dumps(config, indent=2))


def _base(directory: Path, name: str) -> Path:
    if name != "mxfp4":
        return make_checkpoint(
            directory, EXPERTS, TOP_K, LAYERS, expert_width=WIDTH, hidden=HIDDEN
        )
    config = GptOssConfig(
        **(COMMON | {"hidden_size": HIDDEN}),
        intermediate_size=WIDTH,
        head_dim=32,
        num_hidden_layers=LAYERS,
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        layer_types=["sliding_attention", "full_attention"],
    )
    return write(directory, GptOssForCausalLM, config)
