# SPDX-License-Identifier: Apache-2.0
"""What is pinned shares no page with anything else, and a refusal of the driver is explained."""

import mmap
from types import SimpleNamespace

import pytest
import torch

from vllm.model_executor.layers.fused_moe.expert_slots import pinning
from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8])
def test_small_tensors_move_to_pages_of_their_own(dtype):
    tensor = torch.arange(60).reshape(3, 4, 5).to(dtype)
    moved = pinning.own_pages(tensor)
    assert moved.data_ptr() % mmap.PAGESIZE == 0
    assert moved.dtype == dtype and torch.equal(moved, tensor)
    assert pinning.own_pages(tensor.transpose(1, 2)).is_contiguous()


def test_large_tensors_stay_where_they_are():
    large = torch.empty(64 << 20, dtype=torch.uint8)
    assert pinning.own_pages(large).data_ptr() == large.data_ptr()


def test_a_refusal_says_how_much_was_asked_for(monkeypatch):
    runtime = SimpleNamespace(cudaHostRegister=lambda address, size, flags: 2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    with pytest.raises(MoEPrefetchError, match=r"pin 4,000 bytes.*error 2.*ulimit -l"):
        pinning.pinned(torch.zeros(1000))
