# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Handles make up every tensor's share of the staging exactly, and what tensors take is
known from their sizes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.fake_driver import FakeDriver, device_memory
from tests.support.rows import rows_of
from vllm.model_executor.layers.fused_moe.expert_slots.cpu.memory import CPUMemory
from vllm.model_executor.layers.fused_moe.expert_slots.weights.layout import (
    committed_bytes,
    fit,
    split,
)


@given(needs=st.lists(st.integers(0, 3000), max_size=8))
def test_handles_fit_every_need(needs):
    """Exactly; equal needs use equal handles; one need adds few; all cost about the
    largest."""
    sizes, seen = [], {}
    for need in needs:
        taken, new = fit(sizes, need * 4096, 4096)
        handles = [*taken, *range(len(sizes), len(sizes) + len(new))]
        sizes += new
        assert sum(sizes[i] for i in handles) == need * 4096
        assert len(new) <= 16 and all(size and size % 4096 == 0 for size in sizes)
        assert seen.setdefault(need, handles) == handles
    largest = max(needs, default=0) * 4096
    waste = max((size for size in sizes), default=0)
    assert sum(sizes) <= largest + waste * max(0, len(set(needs)) - 1)


def test_the_first_need_makes_sixteen_handles_and_a_rest_makes_one():
    """Few to map for every tensor, and enough for another need to find most of its
    bytes."""
    page = 4096
    assert fit([], 162 * page, page) == ([], [11 * page] * 14 + [8 * page])
    assert fit([], 3 * page, page) == ([], [page] * 3)
    assert fit([11 * page] * 14, 27 * page, page) == ([0, 1], [5 * page])
    assert fit([page], 162 * page, page) == ([0], [11 * page] * 14 + [7 * page])


layouts = st.lists(
    st.tuples(
        st.sampled_from(["w13", "w2", "s"]),
        st.integers(2, 40),
        st.integers(0, 39),
        st.integers(1, 30_000),
    ).map(lambda one: (one[0], one[1], min(one[2], one[1] - 1), one[3])),
    max_size=12,
)


@settings(max_examples=40, deadline=None)
@given(layout=layouts)
@pytest.mark.parametrize("kind", ["host", "cuda"])
def test_what_is_committed_is_counted_from_the_sizes(kind, layout):
    """Plain tensors included."""
    memory = CPUMemory() if kind == "host" else device_memory(FakeDriver())
    tensors = [rows_of(memory, *one) for one in layout]
    shares = [split(*one[1:], memory.page)[0] > 0 for one in layout]
    plain = sum(
        t.numel() for t, shared in zip(tensors, shares, strict=True) if not shared
    )
    assert committed_bytes(layout, memory.page) == memory.committed + plain
