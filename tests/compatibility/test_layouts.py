# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Parallel layouts on real processes: outputs are stock's in the same layout, and ranks
that see the same routing hold the same experts without communication."""

import pytest

from tests.support.apart import run_apart
from vllm.model_executor.layers.fused_moe.expert_slots.counters import SIZES, TOTALS
from vllm.model_executor.layers.fused_moe.expert_slots.shared_store.catalogue import (
    stores,
)

EXPERT_BYTES = 3 * 64 * 128 * 2

exhaustive = pytest.mark.exhaustive


def assert_ranks_agree(slotted, slots):
    """Two ranks with half of every expert each, the same experts in the same slots."""
    first, second = slotted.counters
    assert len(first) == 4 and first == second
    assert all(
        layer["loads"] > 0 and layer["slots"] == slots for layer in first.values()
    )
    assert all(
        layer["store_bytes"] == 32 * EXPERT_BYTES // 2 for layer in first.values()
    )
    assert slotted.residency[0] == slotted.residency[1]
    assert_counted_once(slotted)


def assert_counted_once(slotted):
    """On /metrics the two ranks' events are one rank's; bytes are those of both."""
    first, second = slotted.counters
    for name in {*TOTALS, *SIZES}:
        once = sum(layer[name] for layer in first.values())
        both = once + sum(layer[name] for layer in second.values())
        shown = slotted.metrics[f"vllm:moe_prefetch_{name}"]
        assert shown == (both if "bytes" in name else once) > 0, name


@pytest.mark.parametrize(
    "slots", [8, *(pytest.param(n, marks=exhaustive) for n in (4, 16, 31))]
)
def test_tensor_parallel(checkpoint, tmp_path, run_stock, slots):
    """Two ranks decide alike without communication."""
    layout = {"tensor_parallel_size": 2}
    slotted = run_apart(checkpoint, tmp_path / "answer.json", slots=slots, **layout)
    assert slotted.outputs == run_stock(checkpoint, **layout).outputs
    assert_ranks_agree(slotted, slots)


@exhaustive
def test_tensor_parallel_on_a_shared_store(checkpoint, tmp_path, run_stock):
    """Each rank has a shared store of its own, built by the first start, attached by
    the second."""
    layout = {"tensor_parallel_size": 2}
    place = tmp_path / "stores"
    for word in ("is complete:", "attached,"):
        slotted = run_apart(
            checkpoint,
            tmp_path / "answer.json",
            slots=8,
            shared_store=str(place),
            **layout,
        )
        assert slotted.outputs == run_stock(checkpoint, **layout).outputs
        assert_ranks_agree(slotted, 8)
        assert slotted.log.count(f"{word} {4 * 32 * EXPERT_BYTES // 2} bytes") == 2
    assert [store.state for store in stores(place)] == ["complete", "complete"]


@exhaustive
@pytest.mark.parametrize("slots", [8, 16])
def test_pipeline_parallel(checkpoint, tmp_path, run_stock, slots):
    """Each of two stages has the slots of its own two layers. Compiled: stock 0.32 has
    no pipeline stages on the CPU platform otherwise."""
    layout = {
        "pipeline_parallel_size": 2,
        "enforce_eager": False,
        "compilation_config": {"mode": 3},
    }
    slotted = run_apart(checkpoint, tmp_path / "answer.json", slots=slots, **layout)
    assert slotted.outputs == run_stock(checkpoint, **layout).outputs
    first, second = slotted.counters
    assert len(first) == len(second) == 2 and not set(first) & set(second)
    for rank in slotted.counters:
        assert all(
            layer["loads"] > 0 and layer["slots"] == slots for layer in rank.values()
        )
        assert all(layer["store_bytes"] == 32 * EXPERT_BYTES for layer in rank.values())


@exhaustive
def test_stock_has_no_expert_parallelism_on_the_cpu_platform(checkpoint, tmp_path):
    """Why it is refused there: a stock that has it fails here, and the refusal can
    go."""
    layout = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    with pytest.raises(RuntimeError, match="EngineDeadError"):
        run_apart(checkpoint, tmp_path / "answer.json", **layout)
