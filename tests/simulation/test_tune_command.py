# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What `vllm-moe-prefetch tune` answers and refuses."""

import json
import sys
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest

from tests.simulation.conftest import EXPERTS, MILLION, recorded
from tests.support.traces import counted, layer_of, write_trace
from vllm.model_executor.layers.fused_moe.expert_slots.decisions.policy import Ranking
from vllm.model_executor.layers.fused_moe.expert_slots.trace.reading import Trace
from vllm.plugins.moe_gpu_prefetch.command.tune import speed
from vllm.plugins.moe_gpu_prefetch.command.tune.speed import Speed, speed_of


def answer(tune, *arguments: object) -> dict:
    status, out, err = tune(*arguments, "--json")
    assert status == 0, err
    return json.loads(out)


def test_the_table_and_the_flag(tune, trace):
    """A row for each number, and the flag alone in the last line."""
    status, out, err = tune(trace, "--link", "1GB/s", "--step-time", "2ms")
    assert status == 0 and err == ""
    check = f"{trace}: the simulation equals the engine's counters exactly, in 3 of 3"
    assert " ".join(out.split()).startswith(check)
    assert "some-model: 3 MoE layers of 16 experts, top-2" in out
    rows = [line.split() for line in out.splitlines() if line[:6].strip().isdecimal()]
    assert [int(row[0]) for row in rows] == [2, 3, 4, 6, 8, 10, 12, 14, 16]
    assert {len(row) for row in rows} == {12}
    assert rows[-1][2:6] == ["100.0%", "100.0%", "100.0%", "0.0"]
    assert "Recorded: 234 decode and 6 prefill steps with 4 slots, lru." in out
    assert "Predicted with 1.0 GB/s, given, and 2.00 ms for a step without" in out
    found = answer(tune, trace, "--link", "1GB/s", "--step-time", "2ms")
    assert out.splitlines()[-1] == found["recommendation"]["flag"]


def test_every_figure_by_hand(tune, trace, layers):
    """With other slots and the other policy than those that were recorded: loads of the
    engine's own code, divided and multiplied here."""
    found = answer(tune, trace, "--slots", "5", "--link", "1GB/s", "--step-time", "2ms")
    [row] = found["rows"]
    assert row["slots"] == 5 and row["slot_bytes"] == 3 * 5 * MILLION
    assert row["staging_bytes"] == 11 * MILLION
    for policy in ("lru", "lfu"):
        each = [counted(layer, 5, policy) for layer in layers]
        totals = {name: sum(layer[name] for layer in each) for name in each[0]}
        figures = row[policy]
        assert figures["totals"] == totals
        assert figures["hit_rate"] == totals["hits"] / totals["needed"]
        assert figures["staged_share"] == totals["staged"] / totals["loads"]
        assert figures["overflow_share"] == totals["overflow_steps"] / totals["steps"]
        # A prompt needs all experts, so it loads those that are in no slot.
        prefill = 3 * 6 * (EXPERTS - 5)
        decode = totals["loads"] - prefill
        assert figures["loads_per_token"] == decode / 234
        assert figures["bytes_per_token"] == decode * MILLION / 234
        seconds = 234 * 0.002 + decode * MILLION / 1e9
        assert figures["step_seconds"] == pytest.approx(seconds / 234)
        assert figures["tokens_per_second"] == pytest.approx(234 / seconds)
        seconds = 6 * 0.002 + prefill * MILLION / 1e9
        assert figures["prefill_tokens_per_second"] == pytest.approx(180 / seconds)
    assert row["belady"]["hit_rate"] > row["lru"]["hit_rate"]
    assert found["decode"] == {
        "steps": 234,
        "tokens": 234,
        "experts_per_layer_and_step": 2,
    }
    hits = totals["hits"] - 3 * 6 * 5
    assert row["lfu"]["decode_hit_rate"] == pytest.approx(hits / (3 * 234 * 2))
    assert found["prefill"] == {"steps": 6, "tokens": 180}


def test_the_recommendation(tune, trace, layers):
    """The fewest slots whose time for all steps is within 1 % of the least that the
    limit allows, and within 5 % without a limit; lfu, which loads clearly less here;
    and what a GiB buys."""
    options = ("--link", "1GB/s", "--step-time", "9ms")
    for limit, close in ((10, 0.01), (None, 0.05)):
        limits = () if limit is None else ("--max-slots", limit)
        found = answer(tune, trace, *limits, *options)
        advice = found["recommendation"]
        policy = advice["policy"]
        times = {
            row["slots"]: 234 / row[policy]["tokens_per_second"]
            + 180 / row[policy]["prefill_tokens_per_second"]
            for row in found["rows"]
            if row["slots"] <= (limit or EXPERTS - 1)
        }
        enough = [
            n for n, time in times.items() if time <= min(times.values()) * (1 + close)
        ]
        assert advice["slots"] == min(enough) and advice["limit"] == limit
        if limit is None:
            assert "All 16 experts take" in " ".join(advice["reason"])
            found = answer(tune, trace, "--max-slots", 10, *options)
            advice = found["recommendation"]
    saved = 1 - sum(
        counted(layer, advice["slots"], "lfu")["loads"] for layer in layers
    ) / sum(counted(layer, advice["slots"], "lru")["loads"] for layer in layers)
    assert policy == "lfu" and saved > 0.02
    assert advice["flag"] == f"--moe-gpu-prefetch {advice['slots']}"  # the default
    # All 16 experts of 3 layers are below a GiB.
    assert advice["next_gib"]["slots"] == EXPERTS - advice["slots"]
    assert advice["next_gib"]["loads"] == 1
    assert advice["next_gib"]["context"] is None
    assert "lfu loads" in " ".join(advice["reason"]) and advice["warnings"] == []


def test_the_policy_stays_where_little_is_gained(tune, tmp_path):
    """Uniform routing: both load the same, but for chance."""
    random = np.random.default_rng(0)
    sets = [random.choice(EXPERTS, 2, replace=False) for _ in range(3000)]
    for policy, other in (("lru", "lfu"), ("lfu", "lru")):
        layer = layer_of(
            sets, EXPERTS, 4, top_k=2, routed=2.0, policy=policy, lfu_half_life=64
        )
        found = answer(tune, write_trace(tmp_path / policy, [layer]))
        assert found["recommendation"]["policy"] == policy
        assert any(other in line for line in found["recommendation"]["reason"])
        flag = found["recommendation"]["flag"]
        assert ("lfu_half_life 64" in flag) == (policy == "lfu")
        assert ("policy lru" in flag) == (policy == "lru")


def test_the_next_gib(tune, tmp_path, layers):
    """An expert of 600 MiB in three layers: the next slot takes more than a GiB, less
    one row of staging that is saved."""
    large = [
        replace(layer, bytes_per_expert=600 << 20, totals=None) for layer in layers
    ]
    path = write_trace(tmp_path / "a.trace", large, kv_bytes_per_token=1024.0)
    options = ("--max-slots", "4", "--link", "25GB/s", "--step-time", "2ms")
    more = answer(tune, path, *options)["recommendation"]["next_gib"]
    assert more["slots"] == 1 and more["num_bytes"] == 2 * (600 << 20)
    assert more["context"] == more["num_bytes"] // 1024
    assert more["on_slots"] == (more["speed"] * (1 << 30) / more["num_bytes"] >= 0.05)
    reasons = answer(tune, path, *options)["recommendation"]["reason"]
    assert reasons[-1].startswith("1.17 GiB more buys 1 more slot a layer (")
    assert "tokens of KV cache: better spent on slots, by the rule" in reasons[-1]
    small = [replace(layer, bytes_per_expert=50 << 20) for layer in large]
    path = write_trace(tmp_path / "b.trace", small)
    more = answer(tune, path, *options)["recommendation"]["next_gib"]
    assert more["slots"] == 10 and more["num_bytes"] == 10 * 2 * (50 << 20)


def test_a_budget_is_of_slots_and_staging(tune, trace):
    """n slots of 3 layers and 16 - n rows of staging: 23 of the MB fit 3 slots."""
    advice = answer(tune, trace, "--budget", "23MB")["recommendation"]
    assert advice["limit"] == 3 and advice["slots"] <= 3
    assert "hits" in advice["reason"][0]


def test_without_a_link_nothing_is_predicted(tune, trace):
    found = answer(tune, trace)
    assert found["speed"] is None
    assert found["rows"][0]["lru"]["tokens_per_second"] is None
    status, out, _ = tune(trace)
    assert status == 0 and "Give one with --link 25GB/s." in out
    assert "tokens/s" not in out


def test_another_count_than_the_engines(tune, tmp_path, layers):
    """Names the layer, the counter, and both numbers."""
    wrong = replace(layers[1], totals=layers[1].totals | {"hits": 1})
    path = write_trace(tmp_path / "a.trace", [layers[0], wrong])
    status, out, err = tune(path)
    assert status == 2 and out == ""
    assert f"error: {path}: layers.1: the engine counted 1 hits, the sim" in err
    assert f"the simulation {layers[1].totals['hits']:,}. Tune with" in err


def test_missing_steps(tune, tmp_path, layers):
    """Are said, and nothing is compared."""
    keep = np.arange(len(layers[0].steps)) != 100
    begin, end = layers[0].offsets[100:102]
    sizes = np.diff(layers[0].offsets)[keep]
    gap = replace(
        layers[0],
        steps=layers[0].steps[keep],
        rows=layers[0].rows[keep],
        offsets=np.concatenate(([0], np.cumsum(sizes))),
        experts=np.delete(layers[0].experts, np.arange(begin, end)),
    )
    path = write_trace(tmp_path / "a.trace", [gap, layers[1]])
    found = answer(tune, path)
    assert found["checks"] == [
        f"{path}: only 1 of 2 layers were compared with the engine's counters: 1 steps "
        "are missing."
    ]
    assert "1 steps of layers are missing" in found["recommendation"]["warnings"][0]


def test_what_makes_a_trace_poor(tune, tmp_path):
    """Few steps, mostly prompts, and only prompts, whose speed is then predicted. And
    a step time that is the mean of both kinds."""
    timed = [recorded("a", 0)]
    path = write_trace(tmp_path / "timed", timed, busy_seconds=10.0)
    [warning] = answer(tune, path, "--link", "1GB/s")["recommendation"]["warnings"]
    assert warning.startswith("The step time is the mean of steps that decode and")
    given = answer(tune, path, "--link", "1GB/s", "--step-time", "9ms")
    assert given["recommendation"]["warnings"] == []
    short = recorded("a", 0, steps=41)
    few = write_trace(tmp_path / "few", [short])
    [warning] = answer(tune, few)["recommendation"]["warnings"]
    assert warning.startswith("The trace has 41 steps of a layer.")
    prompts = layer_of([range(16)] * 200, 16, 4, [30] * 200, routed=2.0, top_k=2)
    path = write_trace(tmp_path / "prompts", [prompts])
    found = answer(tune, path, "--link", "1GB/s", "--step-time", "1ms")
    [warning] = found["recommendation"]["warnings"]
    assert warning.startswith("No step only decodes.")
    assert found["rows"][0]["lru"]["tokens_per_second"] is None
    assert "tokens/s of prompts are predicted" in found["recommendation"]["reason"][0]


def test_runs_are_added_and_ranks_are_not(tune, tmp_path, trace, layers):
    """Each run begins anew; of several ranks the one that loads most is shown."""
    warm = [
        replace(layer, start=Ranking([9, 8, 7, 6], [0] * 4), totals=None)
        for layer in layers
    ]
    again = write_trace(tmp_path / "b.trace", warm)
    one, two, both = (
        answer(tune, *paths, "--slots", "5")["rows"][0]["lru"]["totals"]
        for paths in ((trace,), (again,), (trace, again))
    )
    assert both == {name: one[name] + two[name] for name in one}
    assert one["hits"] != two["hits"]
    other = write_trace(tmp_path / "c.trace", [recorded("z", 7, steps=60)], rank=1)
    found = answer(tune, other, trace, "--slots", "5")
    assert found["rank"] == 0 and found["ranks"] == [1, 0]
    assert found["rows"][0]["lru"]["totals"] == one
    _, out, _ = tune(other, trace)
    assert "2 ranks: the figures are of rank 0, which loads most." in out


def step_time(layers, tmp_path, link=None, **header):
    """`speed_of` for a trace of these layers, whose engine made 240 steps."""
    path = write_trace(tmp_path / "a.trace", layers, **header)
    return speed_of([Trace.read(path)], link, None)


def test_the_step_time_of_the_trace(tmp_path, layers):
    """The time of the engine's steps without their loads; on the CPU with them, as they
    took no link."""
    loaded = sum(layer.totals["bytes_loaded"] for layer in layers)
    found = step_time(layers, tmp_path, link=2e9, busy_seconds=5.0)
    assert found.link == 2e9 and found.link_from == "given"
    assert found.step_time == pytest.approx((5 - loaded / 2e9) / 240)
    path = write_trace(tmp_path / "b.trace", layers, link=1e9, busy_seconds=5.0)
    found = speed_of([Trace.read(path)], 2e9, None)
    assert found.step_time == pytest.approx((5 - loaded / 1e9) / 240)
    found = speed_of([Trace.read(path)], None, 0.007)
    assert (found.link, found.step_time) == (1e9, 0.007)
    assert found.link_from == "measured when the trace was recorded"
    found = step_time(layers, tmp_path, 2e9, busy_seconds=5.0, platform="cpu")
    assert found.step_time == pytest.approx(5 / 240)
    assert "of the CPU that recorded" in found.step_time_from and not found.decides


def test_no_step_time(tune, tmp_path, layers):
    """Speeds are bounds then, and hits decide."""
    for header, words in (
        ({"busy_seconds": 0.0}, "does not say how long its steps took"),
        ({"busy_seconds": 0.01}, "took no longer than their loads"),
    ):
        found = step_time(layers, tmp_path, link=1e9, **header)
        assert found.step_time == 0 and words in found.step_time_from
        assert not found.decides
    out = answer(tune, tmp_path / "a.trace", "--link", "1GB/s")
    assert out["rows"][-1]["lru"]["tokens_per_second"] is None  # nothing to wait for
    assert "of the needed experts are hits" in out["recommendation"]["reason"][0]
    _, out, _ = tune(tmp_path / "a.trace", "--link", "1GB/s")
    assert "Hit rates decide, not speeds" in out


def test_the_link_of_this_machine(tmp_path, trace, monkeypatch):
    """If it has a GPU, and neither the user nor the trace says more."""
    read = [Trace.read(trace)]
    monkeypatch.setattr(speed, "_link_of_this_machine", lambda: 3e9)
    found = speed_of(read, None, 1.0)
    assert found == Speed(3e9, "measured on this machine", 1.0, "given")
    assert speed_of(read, 4e9, 1.0).link == 4e9


def test_plots(tune, tmp_path, trace):
    """The same bytes each time, with their words as text; PNG where asked for."""
    for name in ("once", "again"):
        link = ("--link", "1GB/s", "--step-time", "2ms")
        status, out, err = tune(trace, "--plots", tmp_path / name, *link)
        assert status == 0, err
    drawn = sorted((tmp_path / "once").iterdir())
    names = ["hit-rate.svg", "layers.svg", "reuse-distance.svg", "speed.svg"]
    assert [path.name for path in drawn] == names
    assert str(tmp_path / "again" / "speed.svg") in out.splitlines()[0]
    for path in drawn:
        data = path.read_bytes()
        assert data == (tmp_path / "again" / path.name).read_bytes()
        ElementTree.fromstring(data)
    texts = [path.read_text(encoding="utf-8") for path in drawn]
    for text, word in zip(
        texts,
        (">Belady (knows the future)<", ">MoE layer<", ">all layers<", ">tokens/s<"),
        strict=True,
    ):
        assert word in text
    assert tune(trace, "--plots", tmp_path / "png", "--format", "png")[0] == 0
    pictures = sorted((tmp_path / "png").iterdir())
    assert [path.stem for path in pictures] == ["hit-rate", "layers", "reuse-distance"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)


def test_plots_without_matplotlib(tune, tmp_path, trace, monkeypatch):
    """One line that says what to install, and nothing else is done."""
    package = "vllm.plugins.moe_gpu_prefetch.command.tune"
    monkeypatch.delitem(sys.modules, f"{package}.plots", raising=False)
    monkeypatch.delattr(f"{package}.plots", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, out, err = tune(trace, "--plots", tmp_path / "plots")
    assert status == 2 and out == "" and not (tmp_path / "plots").exists()
    assert err.startswith("vllm-moe-prefetch: error: --plots needs matplotlib. Install")
