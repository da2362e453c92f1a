# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The compiled kernel that maps expert blocks to rows, run as a GPU would run it."""

import pytest
import torch

from tests.ptx.simulated import KERNELS, Simulated
from tests.ptx.triton_versions import VERSIONS
from vllm.model_executor.layers.fused_moe.expert_slots.cuda import block_map_kernel
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.block_map_kernel import (
    BLOCKS,
    map_blocks,
)


@pytest.mark.parametrize(
    ("version", "architecture", "blocks"),
    [
        (VERSIONS[0], 80, 1),
        (VERSIONS[0], 86, 17),
        (VERSIONS[1], 89, BLOCKS + 300),
        (VERSIONS[-1], 90, 17),
        (VERSIONS[0], 120, BLOCKS + 300),
    ],
)
def test_a_gpu_maps_blocks(monkeypatch, version, architecture, blocks):
    """Whatever lies behind the last block in use, nothing is read outside the table."""
    kernel = block_map_kernel.block_map_kernel
    path = KERNELS / "block_map_kernel.py"
    launched = Simulated(kernel, path, version, architecture, seed=blocks)
    monkeypatch.setattr(block_map_kernel, "block_map_kernel", launched)
    generator = torch.Generator().manual_seed(blocks)
    table = torch.randperm(60, generator=generator).int()
    experts = torch.randint(0, 60, (blocks,), generator=generator, dtype=torch.int32)
    garbage = torch.tensor([-1, 60, -(1 << 31), (1 << 31) - 1, 61])
    experts[-5:] = garbage[-min(5, blocks) :].int()
    known = (experts >= 0) & (experts < 60)
    expected = torch.where(known, table[experts.clamp(0, 59).long()], -1)
    map_blocks(experts, table)
    assert torch.equal(experts, expected)
    assert not launched.races
