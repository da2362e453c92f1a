# SPDX-License-Identifier: Apache-2.0
"""Stands in for the functions of vLLM's CUDA library that its CPU build lacks, for kernels that run
in the interpreter."""

import pytest
import torch
import torch.nn.functional as F

from vllm import _custom_ops as ops


def align(
    topk_ids, num_experts, block_size, sorted_ids, expert_ids, num_padded, expert_map=None, *_
):
    """What `moe_align_block_size` of vLLM's CUDA library does; an id of -1 looks the map up one
    entry before its beginning."""
    by_expert: dict[int, list[int]] = {}
    for row, expert in enumerate(topk_ids.flatten().tolist()):
        if expert_map is not None:
            expert = expert_map.as_strided((1,), (1,), expert_map.storage_offset() + expert).item()
        if 0 <= expert < num_experts:
            by_expert.setdefault(expert, []).append(row)
    rows, blocks = [], []
    for expert, its_rows in sorted(by_expert.items()):
        its_rows += [topk_ids.numel()] * (-len(its_rows) % block_size)
        rows += its_rows
        blocks += [expert] * (len(its_rows) // block_size)
    sorted_ids.fill_(topk_ids.numel())[: len(rows)] = torch.tensor(rows, dtype=torch.int32)
    expert_ids.fill_(0)[: len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
    num_padded.fill_(len(rows))


def silu_and_mul(activation, out, gate_up, **_):
    gate, up = gate_up.chunk(2, -1)
    out.copy_(F.silu(gate.float()).to(gate.dtype) * up)


def moe_sum(rows, out, topk_ids=None, expert_map=None):
    """Rows of experts that are not on this rank may be rubbish."""
    if expert_map is not None:
        rows = rows.masked_fill(expert_map[topk_ids.long()].lt(0).unsqueeze(-1), 0)
    out.copy_(rows.sum(1))


def stand_in_for_cuda_library(monkeypatch: pytest.MonkeyPatch) -> None:
    module = "vllm.model_executor.layers.fused_moe"
    monkeypatch.setattr(ops, "moe_align_block_size", align)
    monkeypatch.setattr(ops, "moe_sum", moe_sum)
    monkeypatch.setattr(f"{module}.modular_kernel.apply_moe_activation", silu_and_mul)
