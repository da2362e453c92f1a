# SPDX-License-Identifier: Apache-2.0
"""Parallel layouts on real processes: outputs are stock's in the same layout, and ranks that see
the same routing hold the same experts without talking to each other."""

import pytest
from arm import run_arm


@pytest.fixture(scope="module")
def stock(checkpoint, tmp_path_factory):
    """Stock's answers in a layout, asked once."""
    answers = tmp_path_factory.mktemp("stock")
    known = {}

    def ask(**layout):
        key = tuple(layout.items())
        if key not in known:
            known[key] = run_arm(checkpoint, answers / f"{len(known)}.json", **layout)
        return known[key]

    return ask


@pytest.mark.parametrize(
    "slots",
    [
        4,
        pytest.param(16, marks=pytest.mark.exhaustive),
        pytest.param(31, marks=pytest.mark.exhaustive),
    ],
)
def test_tensor_parallel(checkpoint, tmp_path, stock, slots):
    """Two ranks hold half of every expert each, and the same experts in the same slots."""
    layout = {"tensor_parallel_size": 2}
    slotted = run_arm(checkpoint, tmp_path / "slots.json", slots=slots, **layout)
    assert slotted.outputs == stock(**layout).outputs
    first, second = slotted.counters
    assert len(first) == 4 and first == second
    assert all(layer["loads"] > 0 and layer["slots"] == slots for layer in first.values())
    assert all(layer["store_bytes"] == 32 * 3 * 32 * 128 * 2 for layer in first.values())
    assert slotted.residency[0] == slotted.residency[1]


@pytest.mark.parametrize("slots", [8, pytest.param(16, marks=pytest.mark.exhaustive)])
def test_pipeline_parallel(checkpoint, tmp_path, stock, slots):
    """Each of two stages has the slots of its own two layers."""
    layout = {"pipeline_parallel_size": 2}
    slotted = run_arm(checkpoint, tmp_path / "slots.json", slots=slots, **layout)
    assert slotted.outputs == stock(**layout).outputs
    first, second = slotted.counters
    assert len(first) == len(second) == 2 and not set(first) & set(second)
    for rank in slotted.counters:
        assert all(layer["loads"] > 0 and layer["slots"] == slots for layer in rank.values())
        assert all(layer["store_bytes"] == 32 * 3 * 64 * 128 * 2 for layer in rank.values())
