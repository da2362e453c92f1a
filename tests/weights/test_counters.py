# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A layer's counters lie where kernels write and readers read, and say what a step
did."""

import pytest
import torch

from tests.support.fake_driver import FakeDriver, device_memory
from vllm.model_executor.layers.fused_moe.expert_slots.counters import (
    DIRECTORY_VARIABLE,
    TOTALS,
    LayerReading,
    SlotCounters,
    read_counters,
)
from vllm.model_executor.layers.fused_moe.expert_slots.decisions.step import StepPlan


@pytest.mark.parametrize("exposed", [True, False])
def test_counters_lie_where_kernels_can_count(tmp_path, monkeypatch, exposed):
    """On pages of their own; what is written there is what readers see."""
    driver = FakeDriver(host_offset=1 << 46)
    monkeypatch.delenv(DIRECTORY_VARIABLE, raising=False)
    if exposed:
        monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path))
    counters = SlotCounters(
        "layer", 3, slots=4, bytes_per_expert=10, experts=8, replica=True
    )
    assert (
        counters.tensor.shape == (len(TOTALS),) and counters.tensor.dtype == torch.int64
    )
    address = device_memory(driver).pin(counters.tensor)
    assert address == counters.tensor.data_ptr() + driver.host_offset
    counters.tensor.copy_(torch.arange(1, 11))  # what a kernel does
    values = dict(zip(TOTALS, range(1, 11), strict=True))
    values |= {"slots": 4, "experts": 8, "slot_bytes": 40, "store_bytes": 80}
    assert counters.as_dict() == values and counters.bytes_loaded == 10
    readings = read_counters(tmp_path)
    assert readings == [LayerReading(3, "layer", values, None, True)] * exposed
    counters.set_link(25.4e9)
    assert [r.link for r in read_counters(tmp_path)] == [25_400_000_000] * exposed
    assert counters.as_dict() == values
    counters.clear()
    assert not any(counters.as_dict()[name] for name in TOTALS) and counters.slots == 4
    with pytest.raises(AttributeError):
        _ = counters.unheard_of


def plan(needed, hits, staged):
    nothing = torch.empty(0).numpy()
    return StepPlan(needed, hits, staged, nothing, nothing)


def test_what_a_step_adds():
    """No step without an expert; staging and overflow are not the same."""
    counters = SlotCounters("", 0, slots=4, bytes_per_expert=10, experts=8)
    for step in [(0, 0, 0), (3, 3, 0), (4, 1, 2), (7, 3, 3), (5, 2, 0)]:
        counters.add(plan(*step))
    assert {name: counters.as_dict()[name] for name in TOTALS} == {
        "steps": 4,
        "needed": 19,
        "hits": 9,
        "misses": 10,
        "loads": 10,
        "staged": 5,
        "evictions": 5,
        "staged_steps": 2,
        "overflow_steps": 2,
        "bytes_loaded": 100,
    }


def test_a_file_that_was_there_begins_anew(tmp_path, monkeypatch):
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path))
    (tmp_path / "0@layer").write_bytes(b"\7" * 500)
    counters = SlotCounters("layer", 0, 4, 10, 8)
    assert not counters.tensor.any() and len(read_counters(tmp_path)) == 1
