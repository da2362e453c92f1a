# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Stands in for the functions of vLLM's CUDA library that its CPU build lacks, for
kernels that run in the interpreter."""

import pytest
import torch
import torch.nn.functional as F
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from vllm import _custom_ops as ops


def align(
    topk_ids,
    num_experts,
    block_size,
    sorted_ids,
    expert_ids,
    num_padded,
    expert_map=None,
    *_,
):
    """What `moe_align_block_size` of vLLM's CUDA library does: ids out of range are
    left out, then those that the map sends to another rank."""
    places = None if expert_map is None else expert_map.tolist()
    by_expert: dict[int, list[int]] = {}
    for row, expert in enumerate(topk_ids.flatten().tolist()):
        if not 0 <= expert < num_experts:
            continue
        place = expert if places is None else places[expert]
        if place >= 0:
            by_expert.setdefault(place, []).append(row)
    rows, blocks = [], []
    for expert, its_rows in sorted(by_expert.items()):
        its_rows += [topk_ids.numel()] * (-len(its_rows) % block_size)
        rows += its_rows
        blocks += [expert] * (len(its_rows) // block_size)
    sorted_ids.fill_(topk_ids.numel())[: len(rows)] = torch.tensor(
        rows, dtype=torch.int32
    )
    expert_ids.fill_(0)[: len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
    num_padded.fill_(len(rows))


def _swiglu(gate, up, limit=7.0, alpha=1.702):
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


_GATED = {
    MoEActivation.SILU: lambda gate, up: F.silu(gate) * up,
    MoEActivation.GELU: lambda gate, up: F.gelu(gate) * up,
    MoEActivation.GELU_TANH: lambda gate, up: F.gelu(gate, approximate="tanh") * up,
    MoEActivation.RELU2: lambda gate, up: F.relu(gate).square() * up,
    MoEActivation.SITU: lambda gate, up: torch.sigmoid(gate) * torch.tanh(up),
    MoEActivation.SWIGLUOAI: _swiglu,
    MoEActivation.SWIGLUOAI_UNINTERLEAVE: _swiglu,
    MoEActivation.SWIGLUSTEP: lambda gate, up: (
        F.silu(gate).clamp(max=7) * up.clamp(-7, 7)
    ),
}
_UNGATED = {
    MoEActivation.SILU_NO_MUL: F.silu,
    MoEActivation.GELU_NO_MUL: F.gelu,
    MoEActivation.GELU_TANH_NO_MUL: lambda x: F.gelu(x, approximate="tanh"),
    MoEActivation.RELU2_NO_MUL: lambda x: F.relu(x).square(),
}


def activate(
    activation: MoEActivation, out: torch.Tensor, x: torch.Tensor, *_, **__
) -> None:
    """[rows, 2 * width] -> [rows, width], or [rows, width] for activations without a
    gate."""
    x = x.float()
    if activation in _UNGATED:
        out.copy_(_UNGATED[activation](x))
    elif activation is MoEActivation.SWIGLUOAI:  # gate and up alternate
        out.copy_(_GATED[activation](x[..., ::2], x[..., 1::2]))
    else:
        out.copy_(_GATED[activation](*x.chunk(2, -1)))


def moe_sum(rows, out, topk_ids=None, expert_map=None):
    """Rows of no expert, or of one that is not on this rank, may be rubbish."""
    if expert_map is not None:
        elsewhere = expert_map[topk_ids.long().clamp(min=0)].lt(0) | topk_ids.lt(0)
        rows = rows.masked_fill(elsewhere.unsqueeze(-1), 0)
    out.copy_(rows.sum(1))


FP8, FP8_MAX = torch.float8_e4m3fn, 448.0


def _to_fp8(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8)


def scaled_fp8_quant(x, scale=None, *, use_per_token_if_dynamic=False, **_):
    """[tokens, width] -> FP8, and the scale: as given, of each token [tokens, 1], or of
    all tokens together [1]."""
    if scale is None:
        per_token = use_per_token_if_dynamic
        size = x.abs().amax(1, keepdim=True) if per_token else x.abs().max().view(1)
        scale = (size.float() / FP8_MAX).clamp(min=1e-12)
    return _to_fp8(x, scale), scale


def per_token_group_quant_fp8(x, group_size, **_):
    """[tokens, width] -> FP8, and scales [tokens, width / group_size]."""
    groups = x.float().unflatten(-1, (-1, group_size))
    scale = (groups.abs().amax(-1) / FP8_MAX).clamp(min=1e-10)
    return _to_fp8(groups, scale[..., None]).flatten(-2), scale


def silu_and_mul_per_block_quant(x, group_size, quant_dtype, *_, **__):
    """[tokens, 2 * width] -> as `per_token_group_quant_fp8` of the activation."""
    out = torch.empty(x.shape[0], x.shape[1] // 2)
    activate(MoEActivation.SILU, out, x)
    return per_token_group_quant_fp8(out, group_size)


def scaled_int8_quant(x, scale, *_, **__):
    """[tokens, width] -> int8, by the scale given."""
    return (x.float() / scale).round().clamp(-128, 127).to(torch.int8), scale, None


def per_token_quant_int8(x):
    """[tokens, width] -> int8, and scales [tokens, 1]. Stock's is a Triton kernel whose
    function for rounding the interpreter lacks."""
    scale = (x.float().abs().amax(1, keepdim=True) / 127).clamp(min=1e-10)
    return scaled_int8_quant(x, scale)[:2]


def stand_in_for_cuda_library(monkeypatch: pytest.MonkeyPatch) -> None:
    module = "vllm.model_executor.layers.fused_moe"
    monkeypatch.setattr(ops, "moe_align_block_size", align)
    monkeypatch.setattr(ops, "moe_sum", moe_sum)
    for quantise in (scaled_fp8_quant, scaled_int8_quant, silu_and_mul_per_block_quant):
        monkeypatch.setattr(ops, quantise.__name__, quantise)
    for quantise in (per_token_group_quant_fp8, per_token_quant_int8):
        monkeypatch.setattr(f"{module}.utils.{quantise.__name__}", quantise)
    monkeypatch.setattr(f"{module}.modular_kernel.apply_moe_activation", activate)
