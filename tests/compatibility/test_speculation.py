# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Speculative decoding gives stock's outputs from slots. A draft with MoE layers has
slots and counters of its own.

Each engine in a process of its own: on the CPU platform vLLM starts no second one after
it."""

import pytest

from tests.support.apart import ApartRun, run_apart
from tests.support.sample import make_checkpoint, make_with_mtp

SLOTS = 8


def assert_equal_from_slots(checkpoint, answer, run_stock, **options) -> ApartRun:
    own = {name: options.pop(name) for name in ("draft_slots",) if name in options}
    stock = run_stock(checkpoint, **options)
    slotted = run_apart(checkpoint, answer, slots=SLOTS, **own, **options)
    assert slotted.outputs == stock.outputs
    for name in ("drafts", "draft_tokens", "accepted_tokens"):
        counted = slotted.metrics[f"vllm:spec_decode_num_{name}"]
        assert counted == stock.metrics[f"vllm:spec_decode_num_{name}"]
    assert slotted.metrics["vllm:spec_decode_num_drafts"] > 0
    return slotted


@pytest.mark.exhaustive
def test_n_gram(checkpoint, tmp_path, run_stock):
    """Drafts looked up in the prompt; verifying them routes several rows of a
    sequence."""
    config = {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_max": 3,
        "prompt_lookup_min": 1,
    }
    slotted = assert_equal_from_slots(
        checkpoint, tmp_path / "answer.json", run_stock, speculative_config=config
    )
    (rank,) = slotted.counters
    assert len(rank) == 4 and all(layer["loads"] > 0 for layer in rank.values())


@pytest.mark.exhaustive
def test_draft_model(checkpoint, tmp_path, run_stock):
    """The draft's layers have as many slots as the model's, or as many as `draft_slots`
    says, and are counted under names of their own."""
    draft = make_checkpoint(tmp_path / "draft", experts=16, top_k=2, layers=2)
    config = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": 3}
    for own in ({"draft_slots": 5}, {}):
        slotted = assert_equal_from_slots(
            checkpoint,
            tmp_path / "answer.json",
            run_stock,
            speculative_config=config,
            **own,
        )
        (rank,) = slotted.counters
        drafts = {
            name: layer
            for name, layer in rank.items()
            if name.startswith("draft_model")
        }
        assert len(rank) == 6 and len(drafts) == 2
        assert {layer["slots"] for layer in drafts.values()} == {
            own.get("draft_slots", SLOTS)
        }
        assert all(layer["loads"] > 0 for layer in rank.values())
        assert set(slotted.residency[0]) == set(rank)


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param({}, id="eager"),
        pytest.param(
            {"enforce_eager": False, "compilation_config": {"mode": 3}},
            id="compiled",
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_multi_token_prediction(tmp_path, run_stock, mode):
    """An MTP layer is a MoE layer with slots of its own."""
    checkpoint = make_with_mtp(tmp_path / "mtp")
    config = {"method": "mtp", "num_speculative_tokens": 1}
    slotted = assert_equal_from_slots(
        checkpoint,
        tmp_path / "answer.json",
        run_stock,
        speculative_config=config,
        draft_slots=4,
        **mode,
    )
    (rank,) = slotted.counters
    slots = [layer["slots"] for layer in rank.values()]
    assert sorted(slots) == [4, SLOTS, SLOTS] and len(rank) == 3
    assert all(layer["loads"] > 0 for layer in rank.values())
