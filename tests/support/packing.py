# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Quantises one matrix, as the common tools name, shape and pack its tensors."""

from collections.abc import Iterable

import torch

GROUP = 128
"""Inputs that share a scale, in the 4-bit formats with groups."""

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])

Tensors = dict[str, torch.Tensor]
Quantised = tuple[Tensors, torch.Tensor]
"""A matrix's tensors in the checkpoint by the last part of their names, and the values
that they stand for, float32 of the matrix's own shape."""


def packed(values: torch.Tensor, order: Iterable[int] = range(8)) -> torch.Tensor:
    """[..., n] integers in 0..15 as [..., n / 8] int32. Of each eight, `order` names
    the one in the lowest four bits, then the next."""
    eights = values.reshape(*values.shape[:-1], -1, 8)[..., list(order)].long()
    return (eights << torch.arange(0, 32, 4)).sum(-1).to(torch.int32)


def in_groups(
    weight: torch.Tensor, symmetric: bool, group: int = GROUP
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A matrix [out, in] in groups along its inputs: integers in 0..15 [out, in],
    scales and zeros [out, in / group], and what they stand for. Scales are values of
    bfloat16, in which vLLM holds them."""
    groups = weight.view(len(weight), -1, group)
    if symmetric:
        scale = (groups.abs().amax(-1) / 7.5).bfloat16().float()
        zero = torch.full_like(scale, 8)
    else:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale = ((high - low) / 15).bfloat16().float()
        zero = (-low / scale).round().clamp(0, 15)
    whole = (groups / scale[..., None] + zero[..., None]).round().clamp(0, 15)
    values = (whole - zero[..., None]) * scale[..., None]
    return whole.view_as(weight), scale, zero, values.view_as(weight)


def fp8_block(weight: torch.Tensor) -> Quantised:
    """As DeepSeek and Qwen ship it."""
    blocks = weight.view(len(weight) // 128, 128, -1, 128)
    scale = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
    spread = scale[:, None, :, None]
    values = (blocks / spread).to(torch.float8_e4m3fn)
    tensors = {"weight": values.view(weight.shape), "weight_scale_inv": scale}
    return tensors, (values.float() * spread).view_as(weight)


def int8(weight: torch.Tensor) -> Quantised:
    """As llm-compressor writes it: one scale for each output."""
    scale = (weight.abs().amax(1, keepdim=True) / 127.5).bfloat16()
    values = (weight / scale.float()).round().clamp(-128, 127)
    tensors = {"weight": values.to(torch.int8), "weight_scale": scale}
    return tensors, values * scale.float()


def int4(weight: torch.Tensor) -> Quantised:
    """As llm-compressor writes it."""
    whole, scale, _, values = in_groups(weight, symmetric=True)
    shape = torch.tensor(weight.shape)
    tensors = {"weight_packed": packed(whole), "weight_scale": scale.bfloat16()}
    return tensors | {"weight_shape": shape}, values


def int4_zero(weight: torch.Tensor) -> Quantised:
    """The same with zero points, eight outputs in a word."""
    whole, scale, zero, values = in_groups(weight, symmetric=False)
    tensors = {
        "weight_packed": packed(whole),
        "weight_scale": scale.bfloat16(),
        "weight_zero_point": packed(zero.T).T.contiguous(),
        "weight_shape": torch.tensor(weight.shape),
    }
    return tensors, values


def gptq(weight: torch.Tensor) -> Quantised:
    """As AutoGPTQ and GPTQModel write it: [in, out], and zero points less one."""
    whole, scale, zero, values = in_groups(weight, symmetric=True)
    tensors = {
        "qweight": packed(whole).T.contiguous(),
        "qzeros": packed(zero.T - 1),
        "scales": scale.half().T.contiguous(),
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUP,
    }
    return tensors, values


def awq(weight: torch.Tensor) -> Quantised:
    """As AutoAWQ writes it: [in, out], with eight outputs in a word."""
    whole, scale, zero, values = in_groups(weight, symmetric=False)
    tensors = {
        "qweight": packed(whole.T, AWQ_ORDER),
        "qzeros": packed(zero.T, AWQ_ORDER),
        "scales": scale.half().T.contiguous(),
    }
    return tensors, values


def mxfp4(weight: torch.Tensor) -> Quantised:
    """As OpenAI ships gpt-oss: of any [..., out, in]: blocks of 32 inputs in 16 bytes,
    the first of two in the low half."""
    blocks = weight.view(*weight.shape[:-1], -1, 32)
    exponent = blocks.abs().amax(-1).log2().floor() - 2
    scaled = blocks / exponent[..., None].exp2()
    code = (scaled.abs()[..., None] - E2M1).abs().argmin(-1)
    values = E2M1[code] * scaled.sign() * exponent[..., None].exp2()
    code += 8 * (scaled < 0)
    tensors = {
        "blocks": (code[..., ::2] + 16 * code[..., 1::2]).to(torch.uint8),
        "scales": (exponent + 127).to(torch.uint8),
    }
    return tensors, values.view_as(weight)
