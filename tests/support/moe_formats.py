# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Quantised experts as stock's Triton kernels read them: a format packs weights, says
what they stand for, and describes them to the kernel."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.experts.nvfp4_emulation_moe import (
    Nvfp4QuantizationEmulationTritonExperts,
)
from vllm.model_executor.layers.fused_moe.experts.triton_moe import (
    TritonExperts,
    TritonWNA16Experts,
)

from vllm.model_executor.layers.fused_moe import config

Parts = dict[str, torch.Tensor]
"""What one weight becomes: suffix -> [E, ...]. "weight" is always there."""

Tensors = dict[str, Any]
"""The parts of both weights, with their role in front: `w13_weight`, `w2_scale`."""

FP8, FP8_MAX = torch.float8_e4m3fn, 448.0
BLOCK, GROUP, NVFP4_GROUP = 128, 64, 16
FP4_VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


@dataclass(frozen=True)
class Format:
    """One way to quantise experts.

    Attributes:
        pack: [E, out, in] float32 -> its parts, and the float32 weights that they stand
            for.
        config: the layer's tensors, by role and suffix -> stock's quantisation config.
        experts_cls: stock's class.
        tolerance: of outputs, as a part of their size. Activations are quantised too,
            in most formats, and the reference does not do that.
    """

    pack: Callable[[torch.Tensor], tuple[Parts, torch.Tensor]]
    config: Callable[[Tensors], config.FusedMoEQuantConfig]
    experts_cls: type = TritonExperts
    tolerance: float = 2e-3


def _scales(size: torch.Tensor, largest: float) -> torch.Tensor:
    return (size / largest).clamp(min=1e-6).float()


def _fp8(weights: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (weights / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8)


def _nibbles(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Two values of 0 to 15 a byte, the first one low."""
    first, second = values.to(torch.uint8).unflatten(dim, (-1, 2)).unbind(dim + 1)
    return first | (second << 4)


def fp8_block(weights: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    """A scale for each 128 x 128 block, [E, out / 128, in / 128]."""
    blocks = weights.unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK))
    scale = _scales(blocks.abs().amax((2, 4)), FP8_MAX)
    spread = scale.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)
    packed = _fp8(weights, spread)
    return {"weight": packed, "scale": scale}, packed.float() * spread


def fp8_channel(weights: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    """A scale for each output, [E, out, 1]."""
    scale = _scales(weights.abs().amax(2, keepdim=True), FP8_MAX)
    packed = _fp8(weights, scale)
    return {"weight": packed, "scale": scale}, packed.float() * scale


def fp8_tensor(weights: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    """One scale an expert, [E]: rows of four bytes."""
    scale = _scales(weights.abs().amax((1, 2)), FP8_MAX)
    packed = _fp8(weights, scale[:, None, None])
    return {"weight": packed, "scale": scale}, packed.float() * scale[:, None, None]


def int8_channel(weights: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    """Signed, with a scale for each output, [E, out, 1]."""
    scale = _scales(weights.abs().amax(2, keepdim=True), 127)
    packed = (weights / scale).round().to(torch.int8)
    return {"weight": packed, "scale": scale}, packed.float() * scale


def int_groups(
    bits: int, zero_points: bool
) -> Callable[[torch.Tensor], tuple[Parts, torch.Tensor]]:
    """Unsigned, with a scale for each group of inputs, [E, out, in / group] float16,
    and if asked for a zero point, of four bits [E, out / 2, in / group]."""
    middle = 1 << (bits - 1)

    def pack(weights: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        groups = weights.unflatten(2, (-1, GROUP))
        scale = _scales(groups.abs().amax(3), middle - 1).half()
        zero = torch.full_like(scale, middle)
        if zero_points:
            generator = torch.Generator().manual_seed(0)
            zero = zero + torch.randint(-2, 3, zero.shape, generator=generator)
        values = (groups / scale[..., None].float()).round() + zero[..., None]
        values = values.clamp(0, 2 * middle - 1)
        meant = (values - zero[..., None]) * scale[..., None].float()
        packed = values.flatten(2).to(torch.uint8)
        parts = {"weight": _nibbles(packed, 2) if bits == 4 else packed, "scale": scale}
        if zero_points:
            parts["zp"] = _nibbles(zero, 1) if bits == 4 else zero.to(torch.uint8)
        return parts, meant.flatten(2).float()

    return pack


def nvfp4(weights: torch.Tensor) -> tuple[Parts, torch.Tensor]:
    """Four-bit floats, an FP8 scale for each 16 inputs, and one factor an expert."""
    alphas = _scales(weights.abs().amax((1, 2)), FP8_MAX * 6)
    groups = weights.unflatten(2, (-1, NVFP4_GROUP))
    scale = (groups.abs().amax(3) / 6 / alphas[:, None, None]).to(FP8)
    spread = (scale.float() * alphas[:, None, None])[..., None].clamp(min=1e-9)
    codes = (groups.abs() / spread)[..., None].sub(FP4_VALUES).abs().argmin(-1)
    meant = FP4_VALUES[codes] * groups.sign() * spread
    packed = _nibbles((codes + 8 * (groups < 0)).flatten(2), 2)
    return {"weight": packed, "scale": scale, "alphas": alphas}, meant.flatten(2)


def _both(tensors: Tensors, suffix: str, argument: str) -> dict[str, Any]:
    """One part of both weights, as the arguments of stock's functions name them."""
    return {
        argument.format(number): tensors.get(f"{role}_{suffix}")
        for number, role in ((1, "w13"), (2, "w2"))
    }


def _w8a8(make: Callable[..., Any], **options: Any) -> Callable[[Tensors], Any]:
    options = {"a1_scale": None, "a2_scale": None} | options
    return lambda tensors: make(
        **_both(tensors, "scale", "w{}_scale"),
        **_both(tensors, "bias", "w{}_bias"),
        **options,
    )


def _weight_only(make: Callable[..., Any], group: int | None) -> Callable[..., Any]:
    return lambda tensors: make(
        **_both(tensors, "scale", "w{}_scale"),
        **_both(tensors, "zp", "w{}_zp"),
        **_both(tensors, "bias", "w{}_bias"),
        block_shape=[0, group] if group else None,
    )


def _nvfp4_config(tensors: Tensors) -> Any:
    one = {"a1_gscale": torch.tensor(200.0), "a2_gscale": torch.tensor(200.0)}
    return config.nvfp4_moe_quant_config(
        **_both(tensors, "scale", "w{}_scale"),
        **_both(tensors, "alphas", "g{}_alphas"),
        **one,
    )


_fp8_config, _int8_config = (
    config.fp8_w8a8_moe_quant_config,
    config.int8_w8a8_moe_quant_config,
)
_static = {"a1_scale": torch.tensor(2e-3), "a2_scale": torch.tensor(2e-2)}

FORMATS = {
    "fp8 block": Format(
        fp8_block, _w8a8(_fp8_config, block_shape=[BLOCK, BLOCK]), tolerance=6e-2
    ),
    "fp8 channel": Format(
        fp8_channel, _w8a8(_fp8_config, per_act_token_quant=True), tolerance=6e-2
    ),
    "fp8 static": Format(fp8_tensor, _w8a8(_fp8_config, **_static), tolerance=6e-2),
    "fp8 dynamic": Format(fp8_tensor, _w8a8(_fp8_config), tolerance=6e-2),
    "int8 channel": Format(
        int8_channel, _w8a8(_int8_config, per_act_token_quant=True), tolerance=3e-2
    ),
    "int8 weight-only": Format(
        int8_channel, _weight_only(config.int8_w8a16_moe_quant_config, None)
    ),
    "int8 groups": Format(
        int_groups(8, False),
        _weight_only(config.int8_w8a16_moe_quant_config, GROUP),
        TritonWNA16Experts,
    ),
    "int4 groups": Format(
        int_groups(4, False),
        _weight_only(config.int4_w4a16_moe_quant_config, GROUP),
        TritonWNA16Experts,
    ),
    "int4 zero points": Format(
        int_groups(4, True),
        _weight_only(config.int4_w4a16_moe_quant_config, GROUP),
        TritonWNA16Experts,
    ),
    "nvfp4 emulation": Format(
        nvfp4, _nvfp4_config, Nvfp4QuantizationEmulationTritonExperts, tolerance=2e-1
    ),
}
