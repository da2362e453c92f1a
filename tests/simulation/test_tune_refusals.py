# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What `vllm-moe-prefetch tune` refuses is one line."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.traces import layer_of, write_trace


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["nowhere"], "nowhere: No such file or directory."),
        (["text"], "text: not a trace of this version. Record one with"),
        (["nothing"], "nothing: not a trace of this version. Record one with"),
        (["damaged"], "damaged: the frame at byte "),
        (["without-steps"], "without-steps: it has no steps. Send requests to"),
        (
            ["good", "other-model"],
            "other-model is of another, and good of some-model. Tune one model at a",
        ),
        (["good", "other-size"], "other-size and good have other layers or experts,"),
        (["good", "--max-slots", "1"], "--max-slots 1: a layer has at least 2 slots,"),
        (["good", "--budget", "9MB"], "--budget 8.6 MiB: 2 slots a layer, the fewest,"),
        (
            ["good", "--slots", "8", "--max-slots", "4"],
            "--slots: no number is within the limit of 4 slots. Add a smaller one.",
        ),
        (["good", "--slots", "8,17"], "--slots 17: a layer has 2 slots, the router's"),
        (["good", "--slots", "1"], "--slots 1: a layer has 2 slots, the router's"),
        (["good", "good"], "good is named twice. Name each file once."),
        (
            ["good", "other-policy"],
            "other-policy was recorded with lfu, half-life 8, and good with lru, half-",
        ),
        (["good", "--format", "png"], "--format png is of --plots DIRECTORY."),
        (["good", "--plots", "text"], "--plots text: File exists. Name a directory"),
    ],
)
def test_refusals(tune, tmp_path, monkeypatch, layers, arguments, reason):
    """One line, status 2, nothing on standard output."""
    monkeypatch.chdir(tmp_path)
    good = write_trace(Path("good"), layers[:1]).read_bytes()
    Path("text").write_text("some text\n")
    Path("nothing").touch()
    Path("damaged").write_bytes(good[:700] + bytes([good[700] ^ 1]) + good[701:])
    write_trace(Path("without-steps"), [layer_of([], 4, 2)])
    write_trace(Path("other-model"), layers[:1], model="another")
    other = replace(layers[0], bytes_per_expert=7, totals=None)
    write_trace(Path("other-size"), [other])
    write_trace(Path("other-policy"), [replace(layers[0], policy="lfu", totals=None)])
    status, out, err = tune(*arguments)
    assert status == 2 and out == "", out
    assert err.startswith(f"vllm-moe-prefetch: error: {reason}"), err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--slots", "8,auto"], "'8,auto' is not a list of numbers like 16,32,64"),
        (["--slots", "0"], "'0' is not a list of numbers"),
        (["--max-slots", "-1"], "'-1' is not a number of at least 1"),
        (["--link", "fast"], "'fast' is not a bandwidth like 25GB/s"),
        (["--step-time", "12"], "'12' is not a time like 12ms or 0.01s"),
        (["--budget", "12"], "'12' has no unit: say 12GiB"),
        (["--max-slots", "4", "--budget", "1GiB"], "not allowed with argument"),
    ],
)
def test_arguments_that_mean_nothing(tune, trace, arguments, reason):
    status, out, err = tune(trace, *arguments)
    assert status == 2 and out == "" and reason in err
