# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Tensors of bytes in a worker's memory, and what a driver still holds of them."""

import gc

import torch

from tests.support.fake_driver import FakeDriver
from vllm.model_executor.layers.fused_moe.expert_slots.weights.memory import Memory


def rows_of(
    memory: Memory, role: str, count: int, staged: int, row_bytes: int
) -> torch.Tensor:
    """A tensor of bytes."""
    return memory.tensor(role, (count, row_bytes), torch.uint8, staged)


def nothing_left(driver: FakeDriver) -> bool:
    gc.collect()
    return not (driver.used or driver.mappings or driver.reservations or driver.handles)
