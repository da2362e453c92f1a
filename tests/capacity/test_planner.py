# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The planner's arithmetic: what N slots take, what fits, and which N `auto` takes."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm.model_executor.layers.fused_moe.expert_slots.capacity.host_memory import (
    HostMemory,
)
from vllm.model_executor.layers.fused_moe.expert_slots.capacity.plan import (
    Footprint,
    Limits,
    MoELayer,
)
from vllm.model_executor.layers.fused_moe.expert_slots.capacity.planner import (
    CapacityPlanner,
)
from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError
from vllm.model_executor.layers.fused_moe.expert_slots.sizes import GIB

MIB = 1 << 20


def planner(gpu_bytes=10 * GIB, stages=1, processing_bytes=0, **limits):
    """64 experts of 10 MiB in 4 layers, top-4; 1 GiB of other weights, 100 MiB a
    sequence."""
    rows = (("w13", 6 * MIB), ("w2", 4 * MIB))
    footprint = Footprint(
        layers=(MoELayer(64, 4, rows, processing_bytes=processing_bytes),) * 4,
        other_weight_bytes=GIB,
        kv_sequence_bytes=100 * MIB,
        kv_block_bytes=MIB,
        activation_bytes=200 * MIB,
    )
    defaults = {
        "gpu_limit": "the GPU",
        "kv_cache_bytes": None,
        "host": None,
        "host_reserve": 8 * GIB,
        "ranks_per_host": stages,
        "host_is_device": False,
        "page": 2 * MIB,
        "max_num_seqs": 8,
        "max_model_len": 4096,
        "shortens": False,
        "rows_per_sequence": 1,
    }
    return CapacityPlanner(
        [footprint] * stages, Limits(gpu_bytes, **(defaults | limits))
    )


def test_the_parts_of_a_plan_add_up():
    """GPU bytes are slots of every layer, one set of staging rows, other weights and
    overhead; the KV cache gets the rest."""
    plan = planner().plan(16)
    assert plan.slot_bytes == 4 * 16 * 10 * MIB
    assert plan.staging_bytes == (64 - 16) * 10 * MIB
    experts = plan.slot_bytes + plan.staging_bytes
    assert plan.gpu_bytes == experts + plan.other_weight_bytes + plan.overhead_bytes
    assert plan.gpu_bytes + plan.kv_cache_bytes == 10 * GIB
    assert plan.host_bytes == 4 * 64 * 10 * MIB
    assert plan.fits and plan.kv_sequences == pytest.approx(
        (plan.kv_cache_bytes / MIB - 1) / 100
    )


def test_full_residency_has_no_host_store():
    """N = E and above: every expert on the GPU, nothing in the store."""
    plan = planner(20 * GIB).plan(100)
    assert (
        plan.slots == 64
        and plan.host_bytes == 0
        and plan.slot_bytes == 4 * 64 * 10 * MIB
    )
    assert plan.staging_bytes == 0


def test_what_is_lost_at_the_edges_of_pages_is_counted():
    """Rows that are no multiple of a page, and tensors too small to share one."""
    layer = MoELayer(8, 2, (("weight", 3 * MIB), ("scale", 100)))
    footprint = Footprint((layer,) * 3, 0, 0, 0, 0)
    # Of five staged rows, 15 MiB, seven pages are shared; 10 MiB of the last four rows
    # are private.
    assert (
        footprint.staging_bytes(3, 2 * MIB) == (14 + 3 * (10 - 9)) * MIB + 3 * 5 * 100
    )


@settings(deadline=None)
@given(
    gpu_mib=st.integers(1500, 8000),
    max_num_seqs=st.integers(1, 64),
    rows=st.integers(1, 6),
    kv_mib=st.none() | st.integers(50, 2000),
)
def test_auto_is_the_largest_n_that_leaves_the_kv_cache_its_room(
    gpu_mib, max_num_seqs, rows, kv_mib
):
    """The rule of the docs, restated: workload, at most half of the free memory, at
    least one."""
    kv_bytes = None if kv_mib is None else kv_mib * MIB
    asked = planner(
        gpu_mib * MIB,
        max_num_seqs=max_num_seqs,
        rows_per_sequence=rows,
        kv_cache_bytes=kv_bytes,
    )
    smallest = min(64, 4 * rows)
    if not asked.plan(smallest).fits:
        with pytest.raises(MoEPrefetchError, match="auto does not fit"):
            asked.auto()
        return
    free = gpu_mib - 1024 - 200 - 512
    room = max(101, min(100 * max_num_seqs + 1, free / 2)) if kv_mib is None else kv_mib
    # Each slot more takes a row in four layers and saves one of staging.
    expected = max(smallest, min(64, int((free - room - 640) // 30)))
    assert asked.auto() == expected
    assert asked.plan(expected).fits


def test_quantised_experts_must_fit_while_they_are_processed():
    """Beside weights, slots and staging, and before anything else is there. Not where
    every expert has its slot: those layers are stock's."""
    asked = planner(4 * GIB, processing_bytes=2 * GIB)
    assert asked.plan(16).processing_bytes == 2 * GIB
    assert asked.plan(16).kv_cache_bytes == planner(4 * GIB).plan(16).kv_cache_bytes
    largest = (4096 - 2048 - 1024 - 640) // 30
    assert asked.largest() == largest < planner(4 * GIB).largest()
    assert asked.auto() == largest < planner(4 * GIB).auto()
    with pytest.raises(
        MoEPrefetchError,
        match=r"N=13 needs 4\.01 GiB while it is loaded \(0\.51 GiB slots, 0\.50 GiB "
        r"staging, 1\.00 GiB other weights, 2\.00 GiB at most to process quantised "
        r"experts\), there are the GPU. The largest N that fits is 12",
    ):
        asked.refuse(largest + 1, largest + 1)
    whole = planner(20 * GIB, processing_bytes=90 * GIB)
    assert whole.largest() == 64 and whole.plan(64).processing_bytes == 0


def test_the_rank_that_processes_the_most_counts():
    """Beside another that needs more for serving."""
    plain, quantised = (
        planner(processing_bytes=size).footprints[0] for size in (0, 9 * GIB)
    )
    heavy = replace(plain, other_weight_bytes=2 * GIB)
    asked = CapacityPlanner([heavy, quantised], planner().limits)
    assert "9.00 GiB at most to process" in asked.plan(8).reason


@settings(deadline=None)
@given(gpu_mib=st.integers(1000, 8000))
def test_whatever_fits_fits_with_fewer_slots(gpu_mib):
    """`largest` is a boundary: every N up to it fits, no N above."""
    asked = planner(gpu_mib * MIB)
    largest = asked.largest() or 3
    assert [asked.plan(n).fits for n in range(4, 65)] == [
        n <= largest for n in range(4, 65)
    ]


@pytest.mark.parametrize(
    ("limits", "slots", "message"),
    [
        ({"gpu_bytes": 4 * GIB}, 60, "The largest N that fits is 53"),
        ({"gpu_bytes": 2 * GIB}, 40, "not even 4 .* --gpu-memory-utilization"),
        (
            {"kv_cache_bytes": 50 * MIB},
            8,
            "4,096 tokens take 101.0 MiB .* 50.0 MiB are given",
        ),
        (
            {"gpu_bytes": 4 * GIB, "host": HostMemory(32 * GIB, 9 * GIB)},
            8,
            r"2\.50 GiB of host memory, 9\.00 GiB are available and 8\.00 GiB must .* "
            r"No N fits",
        ),
        (
            {"gpu_bytes": 20 * GIB, "host": HostMemory(32 * GIB, 9 * GIB)},
            8,
            "The model fits whole: serve it without --moe-gpu-prefetch",
        ),
    ],
)
def test_a_refusal_says_what_is_needed_what_there_is_and_the_way_out(
    limits, slots, message
):
    """Each kind of shortage."""
    with pytest.raises(MoEPrefetchError, match=message):
        planner(**limits).refuse(slots, slots)


def test_no_host_memory_is_asked_for_full_residency():
    """Where no store fits, N = E may."""
    asked = planner(20 * GIB, host=HostMemory(32 * GIB, 9 * GIB))
    assert not asked.plan(63).fits and asked.plan(64).fits and asked.largest() == 64


def test_every_rank_of_a_machine_needs_its_store():
    """Two stages with two tensor-parallel ranks each: four stores."""
    assert (
        planner(stages=2, ranks_per_host=4).plan(8).host_bytes == 4 * 4 * 64 * 10 * MIB
    )
    assert (
        planner(stages=2, ranks_per_host=2).plan(8).host_bytes == 2 * 4 * 64 * 10 * MIB
    )


def test_speculation_raises_what_a_batch_of_one_needs():
    """Three speculative tokens: four rows of top-4."""
    assert planner(rows_per_sequence=4).smallest == 16
