# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""vLLM's Marlin kernel for 4-bit and FP8 experts in an engine on the CPU. Stock's
Python runs, with stand-ins for what its CUDA library repacks and multiplies.

The stand-ins of repacking keep weights in their order. Scales, zero points and biases
are as stock's Python permutes them, and the GEMM of `marlin_layer.py` undoes it.
"""

import pytest
import torch
from vllm.model_executor.layers.fused_moe.experts import marlin_moe
from vllm.model_executor.layers.quantization.utils.marlin_utils import get_scale_perms
from vllm.scalar_type import scalar_types

from tests.support import marlin_layer
from tests.support.marlin_layer import E2M1, NIBBLES
from tests.support.packing import AWQ_ORDER, packed
from vllm import _custom_ops as ops

_OF_SCALES, _OF_ONE_GROUP = map(torch.tensor, get_scale_perms())
BYTES = torch.arange(0, 32, 8)
FP8_TO_FP16 = 2**8
"""Stock's Python multiplies the scales by it, for a cast that is cheap on a GPU."""

_OF_ZEROS = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])


def repack_gptq(weight: torch.Tensor, size_k: int, size_n: int, *_, **__):
    """[..., in / 8, out] int32 -> [..., in / 16, 2 * out]."""
    return weight.reshape(*weight.shape[:-2], size_k // 16, 2 * size_n)


def repack_one(b_q_weight: torch.Tensor, size_k: int, size_n: int, num_bits: int, **_):
    """One expert, of four or eight bits."""
    return b_q_weight.reshape(size_k // 16, num_bits // 2 * size_n)


def repack_awq(weight: torch.Tensor, size_k: int, size_n: int, *_, **__):
    """[E, in, out / 8] int32, eight outputs in a word in AWQ's order."""
    values = (weight[..., None] >> NIBBLES & 15)[..., _inverse(AWQ_ORDER)]
    columns = values.reshape(len(weight), size_k, size_n).mT
    return repack_gptq(packed(columns).mT, size_k, size_n)


def _inverse(order) -> torch.Tensor:
    return torch.as_tensor(order).argsort()


def _undone(permuted: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    return permuted.reshape(-1, len(order))[:, _inverse(order)].view(permuted.shape)


def dequantised(weight, scale, zeros, global_scale, kind) -> torch.Tensor:
    """One expert's [in / 16, 2 * out] int32, of FP8 [in / 16, 4 * out], as float32 [in,
    out]."""
    if kind == scalar_types.float8_e4m3fn:
        return _of_fp8(weight, scale)
    size_k, size_n = len(weight) * 16, weight.shape[1] // 2
    whole = weight.reshape(size_k // 8, 1, size_n) >> NIBBLES.view(1, 8, 1) & 15
    whole, scale = whole.reshape(size_k, size_n), scale.float()
    spread = size_k // len(scale)
    if kind == scalar_types.float4_e2m1f:
        scale = scale.view(-1, 4)[:, [0, 2, 1, 3]].view(scale.shape)
        values = E2M1[whole & 7] * (1 - 2 * (whole >> 3))
    elif kind == scalar_types.uint4:
        zeros = _undone((zeros[..., None] >> NIBBLES & 15), _OF_ZEROS)
        zeros = _undone(zeros.reshape(len(zeros), size_n), _OF_SCALES)
        values = whole - zeros.repeat_interleave(spread, 0)
    else:
        values = whole - 8
    return values * _undone(scale, _OF_SCALES).repeat_interleave(spread, 0)


def _of_fp8(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    size_k, size_n = len(weight) * 16, weight.shape[1] // 4
    values = weight.reshape(size_k // 4, 1, size_n) >> BYTES.view(1, 4, 1) & 255
    values = values.to(torch.uint8).view(torch.float8_e4m3fn).float()
    order = _OF_ONE_GROUP if len(scale) == 1 else _OF_SCALES
    scale = _undone(scale.float(), order) / FP8_TO_FP16
    spread = scale.repeat_interleave(size_k // len(scale), 0)
    return values.reshape(size_k, size_n) * spread


def gemm(x, out, weight, bias, *args, **kwargs):
    bias = None if bias is None else _undone(bias, _OF_ONE_GROUP)
    return marlin_layer.gemm(x, out, weight, bias, *args, **kwargs)


def stand_in_for_marlin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our hook is not put in its place: an engine with slots does that."""
    monkeypatch.setattr(ops, "moe_align_block_size", marlin_layer.align)
    monkeypatch.setattr(marlin_layer, "dequantised", dequantised)
    monkeypatch.setattr(ops, "moe_wna16_marlin_gemm", gemm)
    monkeypatch.setattr(ops, "gptq_marlin_repack", repack_one)
    monkeypatch.setattr(ops, "gptq_marlin_moe_repack", repack_gptq)
    monkeypatch.setattr(ops, "awq_marlin_moe_repack", repack_awq)
    monkeypatch.setattr(marlin_moe, "get_marlin_workspace", lambda device: None)
    marlin_layer.gemms.clear()
