# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a limit changes in the advice of `vllm-moe-prefetch tune`."""

from dataclasses import replace

from tests.simulation.conftest import EXPERTS, MILLION
from tests.simulation.test_tune_command import answer
from tests.support.traces import write_trace


def test_where_every_expert_fits_no_slots_are_advised(tune, trace):
    """They would only cost what they save."""
    found = answer(tune, trace, "--budget", "1GiB", "--link", "1GB/s")
    advice = found["recommendation"]
    assert advice["slots"] == EXPERTS == advice["limit"]
    assert advice["reason"] == [
        "All 16 experts of a layer fit the limit. Serve without --moe-gpu-prefetch, "
        "which is the same."
    ]


def test_a_budget_is_that_of_the_rank_with_most_to_hold(tune, tmp_path, layers):
    """Not that of the rank that loads most."""
    paths = [
        write_trace(tmp_path / "busy", layers, rank=0),
        write_trace(
            tmp_path / "large",
            [
                replace(each, bytes_per_expert=5 * MILLION, totals=None)
                for each in layers[:2]
            ],
            rank=1,
        ),
    ]
    slots = answer(tune, *paths, "--budget", "100MB")["recommendation"]["limit"]
    for each, fits in ((slots, True), (slots + 1, False)):
        large = (2 * each + EXPERTS - each) * 5 * MILLION
        assert (large <= 100 * MILLION) == fits
