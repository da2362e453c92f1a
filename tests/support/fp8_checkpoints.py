# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""FP8 checkpoints as llm-compressor writes them, which no CPU kernel of vLLM's runs:
one scale for each output, or for each matrix, with the activations' beside it."""

import torch

from tests.support.packing import Quantised
from tests.support.quantised import EXPERTS, LAYERS, Format

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
INPUT_SCALES = {"w13_input_scale": 0.04, "w2_input_scale": 0.016}
"""The largest of a layer, one an expert: what stock keeps. They cut no activation
off."""


def fp8_channel(weight: torch.Tensor) -> Quantised:
    scale = (weight.abs().amax(1, keepdim=True) / FP8_MAX).bfloat16()
    values = (weight / scale.float()).to(FP8)
    tensors = {"weight": values, "weight_scale": scale}
    return tensors, values.float() * scale.float()


class StaticScales:
    """Quantises the matrices of a checkpoint one after another, in the order of their
    names: of each expert down, gate, up. Each expert has an input scale of its own."""

    def __init__(self) -> None:
        self.matrices = 0

    def __call__(self, weight: torch.Tensor) -> Quantised:
        expert, part = divmod(self.matrices, 3)
        self.matrices = (self.matrices + 1) % (3 * EXPERTS * LAYERS)
        largest = INPUT_SCALES["w13_input_scale" if part else "w2_input_scale"]
        share = 0.5 + 0.5 * (expert % EXPERTS) / (EXPERTS - 1)
        scale = (weight.abs().max() / FP8_MAX).float().view(1)
        values = (weight / scale).to(FP8)
        tensors = {
            "weight": values,
            "weight_scale": scale,
            "input_scale": torch.tensor([largest * share]),
        }
        return tensors, values.float() * scale


def _config(weights: str, activations: str, dynamic: bool) -> dict:
    common = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": common | {"strategy": weights, "dynamic": False},
        "input_activations": common | {"strategy": activations, "dynamic": dynamic},
        "output_activations": None,
        "format": "float-quantized",
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*self_attn.*", r"re:.*mlp\.gate$"],
    }


FP8_FORMATS = {
    "fp8-channel": Format(fp8_channel, _config("channel", "token", True), 0),
    "fp8-static": Format(StaticScales(), _config("tensor", "tensor", False), 0),
}
"""By the names that `make_quantised` takes where they are added to its formats."""
