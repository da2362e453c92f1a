# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""One engine of the GPU's proof on the CPU platform, and what is watched of it on a
GPU."""

import json
import sys
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import Mock

import psutil
import pytest
import torch
from vllm.model_executor.model_loader import dummy_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from benchmarks.gpu import engine, exact, runs, speed, watch
from tests.support import wait_until
from tests.support.engine import moe_layers
from vllm.plugins.moe_gpu_prefetch import start as start_up

UNION = 23.1
"""Experts that eight sequences of Qwen1.5-MoE need: `unions` of
benchmarks/routing/published.py, whose import compiles."""

REQUEST = {
    **{"model": runs.TINY | {"experts": 60}, "tokens": 4, "profiled": True},
    **{"routing": "topics-qwen1.5", "batches": [2, 8]},
    **{"prefills": [24], "max_model_len": 128, "max_num_seqs": 8},
    **{"serving": (2, 8, 4)},
    "options": {"enforce_eager": True, **runs.slots_option(8)},
}


def test_an_engine_measures_and_its_rows_compare_with_stock():
    """An engine with slots: counters and step times. Eight sequences need together what
    eight of the model need that the routing is calibrated to."""
    measured = engine.run_engine(REQUEST)
    assert "failed" not in measured, measured
    decode = measured["decode"]["2"]
    assert decode["needed"] >= decode["hits"] > 0 and decode["loads"] > 0
    assert decode["bytes_loaded"] == pytest.approx(decode["loads"] * 3 * 64 * 128 * 2)
    assert (
        decode["steps"] == 2
        and decode["staged"] == 0
        and measured["prefill"]["24"]["staged"] > 0
    )
    together = measured["decode"]["8"]
    assert together["needed"] / together["steps"] == pytest.approx(UNION, rel=0.08)
    assert measured["tokens_per_s"] > 0
    for what in ("decode, batch 2", "decode, batch 8", "prefill 24"):
        assert measured["parts"][what]["experts, ms"] > 0
    rate = 1e6
    rows = speed.speed_rows("N = 8", "topics", [measured], [measured], rate)
    assert [row["what"] for row in rows] == [
        *("decode, batch 2", "decode, batch 8", "prefill 24", "the engine")
    ]
    assert rows[3]["answers as stock's"] and len(measured["answers"]) == 4
    assert rows[0]["of stock"] == 1 and rows[0]["bound ms"] > rows[0]["ms"]
    assert rows[1]["tokens/s"] == pytest.approx(8e3 / together["ms"])
    assert rows[2].items() >= measured["parts"]["prefill 24"].items()


@pytest.fixture
def runs_instead(tmp_path, monkeypatch):
    """Lets a script run in the place of an engine; its second argument is the file."""

    def instead(script):
        monkeypatch.setattr(
            *(engine.psutil, "Popen"),
            lambda command, **options: popen(
                [sys.executable, "-c", script, *command[3:]], **options
            ),
        )

    popen = engine.psutil.Popen
    monkeypatch.setattr(engine, "LOGS", tmp_path)
    return instead


NOTHING = {"batches": [], "prefills": [], "serving": None, "profiled": False}
TURNED = """
from vllm.model_executor.model_loader import dummy_loader
from benchmarks.gpu import engine

fill_alike = engine.fill_alike


def fill_turned():
    fill_alike()
    fill = dummy_loader.initialize_single_dummy_weight

    def turned(parameter, **options):
        fill(parameter, **options)
        if parameter.dim() == 3:
            parameter.data.copy_(parameter.data.flip(0))

    dummy_loader.initialize_single_dummy_weight = turned


engine.fill_alike = fill_turned
engine.main()
"""


def test_answers_depend_on_the_experts(runs_instead):
    """Those from slots are stock's. With the same experts in another order they are
    not."""
    stock = engine.run_engine(
        {**REQUEST, **NOTHING, "options": {"enforce_eager": True}}
    )
    slots = engine.run_engine({**REQUEST, **NOTHING})
    runs_instead(TURNED)
    turned = engine.run_engine({**REQUEST, **NOTHING})
    assert slots["answers"] == stock["answers"] != turned["answers"]
    assert len({token for ids, _ in stock["answers"] for token in ids}) > 2


def test_a_failed_engine_is_a_result(tmp_path, monkeypatch, capsys):
    """With the error, though it is not the last line of the log."""
    monkeypatch.setattr(engine, "LOGS", tmp_path / "logs")
    options = {"name": "a, b", "options": {"no_such_option": 1}}
    failed = engine.run_engine({**REQUEST, **options})
    assert failed["failed"].startswith("TypeError") and "no_such" in failed["failed"]
    assert "Traceback" in capsys.readouterr().out
    log = tmp_path / "logs" / "a-b.log"
    assert failed["failed"] in log.read_text()


def test_an_engine_gets_its_environment(runs_instead, monkeypatch):
    """The request's goes before this process's, and that before ours."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    runs_instead(
        "import json, os, sys; open(sys.argv[2], 'w').write(json.dumps({**os.environ}))"
    )
    request = {"environment": {"VLLM_LOGGING_LEVEL": "INFO"}, "routing": "uniform"}
    found = engine.run_engine(request)
    assert found["VLLM_MOE_ROUTING_SIMULATION_STRATEGY"] == "uniform"
    assert found["VLLM_LOGGING_LEVEL"] == "INFO" and found["HF_HUB_OFFLINE"] == "0"
    assert found["VLLM_NO_USAGE_STATS"] == "1"


def test_an_answer_counts_however_the_process_ends(runs_instead):
    runs_instead("import sys; open(sys.argv[2], 'w').write('[7]'); sys.exit(9)")
    assert engine.run_engine({}) == [7]
    runs_instead("")
    assert engine.run_engine({}) == {"failed": "no output"}


def test_the_error_of_a_log_is_found(runs_instead):
    log = ["Traceback", "[rank0]: ValueError: no such backend", "W0 at the end"]
    runs_instead(f"print(*{log!r}, sep=chr(10))")
    assert engine.run_engine({}) == {"failed": log[1]}
    runs_instead("print('the last line')")
    assert engine.run_engine({}) == {"failed": "the last line"}


def test_an_engine_that_takes_too_long_ends_with_its_children(runs_instead, tmp_path):
    """Which may hold the GPU's memory."""
    number = tmp_path / "child"
    runs_instead(
        "import subprocess, sys, time; child = subprocess.Popen(['sleep', '600']); "
        f"open({str(number)!r}, 'w').write(str(child.pid)); time.sleep(600)"
    )
    assert engine.run_engine({}, 3) == {"failed": "no answer within 3 s"}
    wait_until(lambda: ended(int(number.read_text())))


def ended(number):
    try:
        return psutil.Process(number).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def with_a_wrong_slot(llm):
    layers = moe_layers(llm)
    layers[1].slot_manager.rows.slot_rows["w2_weight"][5] += 1
    return layers


@pytest.mark.parametrize("difference", [None, "slots", "trace"])
def test_an_engine_from_slots_is_looked_at(
    checkpoint, tmp_path, monkeypatch, difference
):
    """One with a trace, eager, on the CPU. A slot with another expert in it, and a
    trace that does not give the counters, are noticed."""
    if difference == "trace":
        monkeypatch.setattr("tests.support.traces.counted", lambda *layer: {})
    elif difference:
        monkeypatch.setattr("tests.support.engine.moe_layers", with_a_wrong_slot)
    monkeypatch.setattr(engine, "WORK", tmp_path)
    monkeypatch.setattr(exact, "checkpoint", lambda: checkpoint)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    eager = {"dtype": "bfloat16", "enforce_eager": True, "slots": 8, "policy": "lfu"}
    eager["trace"] = "a.trace"
    request = {"arm": "bfloat16", "exact": eager, "environment": {}}
    measured = exact.measure_exact(request)
    assert exact.as_asked({**request, "measured": measured})
    assert measured["slots hold their experts"] is (difference != "slots")
    assert (measured["trace"] == exact.EQUAL) is (difference != "trace")
    assert measured["staging is shared"] and measured["loaded"]
    assert len(measured["outputs"]) == 3 and measured["staged"] > 0


def test_memory_is_compared_with_its_plan():
    plan = SimpleNamespace(
        slot_bytes=60 << 30, staging_bytes=1 << 30, other_weight_bytes=2 << 30
    )
    for rows, kept, peak, planned, off in (
        (61 << 30, 2 << 30, 2 << 30, True, True),
        (61 << 30, 4 << 30, 4 << 30, False, True),
        (61 << 30, 2 << 30, 3 << 30, True, False),
    ):
        row = watch.compared(plan, rows, kept, peak)
        assert row["memory as planned"] is planned
        assert row["experts stayed off"] is off


def test_the_load_of_an_engine_is_watched(monkeypatch):
    """torch's memory counts from before the load, and rows once."""
    held = iter([1 << 30, 3 << 30])
    for name, value in (
        ("reset_peak_memory_stats", lambda: None),
        ("memory_allocated", lambda: next(held)),
        ("max_memory_allocated", lambda: 3 << 30),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    memory = SimpleNamespace(committed=61 << 30)
    layer = SimpleNamespace(slot_manager=1, num_slots=8, _memory=memory)
    model = SimpleNamespace(modules=lambda: [object(), layer, layer])
    plan = SimpleNamespace(
        slot_bytes=60 << 30, staging_bytes=1 << 30, other_weight_bytes=2 << 30
    )
    planner = SimpleNamespace(plan=lambda slots: plan if slots == 8 else None)
    monkeypatch.setattr(start_up, "planner_for", lambda *_: planner)
    monkeypatch.setattr(BaseModelLoader, "load_model", lambda self: model)
    measured = {}
    watch.watch_loading(measured)
    start_up.planner_for()
    assert BaseModelLoader.load_model(object()) is model
    assert measured["memory"] == watch.compared(plan, 61 << 30, 2 << 30, 2 << 30)
    assert measured["memory"]["GiB taken"] == 63


def test_kernels_are_parts_of_a_step():
    """By the names that the GPU's kernels have."""
    kernels = {
        **{"plan_kernel": 1e3, "gather_kernel": 2e3, "fused_moe_kernel": 3e3},
        "void at::native::vectorized_gather_kernel<16>": 1e3,
        **{"void vllm::moe::moe_align_block_size_kernel<int>": 4e3},
        **{"kernel_unified_attention": 5e3, "nvjet_tst_128x64": 7e3},
    }
    assert watch.in_parts(kernels, 2) == {
        **{"plan, ms": 0.5, "loads, ms": 1.0, "experts, ms": 3.5},
        **{"attention, ms": 2.5, "other, ms": 4.0, "GPU ms": 11.5},
    }


def test_a_profiler_that_fails_is_no_end(monkeypatch):
    """Whether it fails before the work or in it."""

    class Profiler:
        def __init__(self, activities):
            raise RuntimeError("no CUPTI")

    assert "experts, ms" in watch.parts_of(lambda: None, 1)
    monkeypatch.setattr(torch.profiler, "profile", Profiler)
    assert watch.parts_of(lambda: None, 1) == {"parts": "RuntimeError: no CUPTI"}


def test_a_gpus_kernels_alone_are_summed_up(monkeypatch):
    """An event of the host has its kernels' time as well."""
    kinds = torch.autograd.DeviceType
    events = [
        SimpleNamespace(key=key, self_device_time_total=5, device_type=kind)
        for key, kind in (("plan_kernel", kinds.CUDA), ("launch", kinds.CPU))
    ]
    profile = nullcontext(SimpleNamespace(key_averages=lambda: events))
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: profile)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert watch.profiled(lambda: None) == {"plan_kernel": 5}


def test_dummies_have_the_same_values_everywhere(monkeypatch):
    """And no two experts of a model are alike, whose sizes are powers of two."""
    monkeypatch.setattr(engine, "DRAWN", 99)
    fill = dummy_loader.initialize_single_dummy_weight
    monkeypatch.setattr(dummy_loader, "initialize_single_dummy_weight", fill)
    engine.fill_alike()
    experts, other, norm = torch.zeros(6, 2, 64), torch.zeros(9, 9), torch.zeros(50)
    eight_bits = torch.zeros(7, 50).to(torch.float8_e4m3fn)
    for tensor in (experts, other, norm, eight_bits):
        dummy_loader.initialize_single_dummy_weight(tensor)
    assert torch.equal(other.flatten(), experts.flatten()[:81])
    assert len({str(expert.tolist()) for expert in experts}) == 6
    assert (norm == 1).all() and eight_bits.float().any()
    assert experts.abs().max() <= engine.LARGEST
    assert engine.DRAWN % 2


def test_what_was_measured_is_kept_before_a_profiler_runs(tmp_path, monkeypatch):
    """It may end the process. And an engine that has answered does not hang."""
    answer = tmp_path / "answer"

    def measured_by(request, keep):
        keep({"ms": 7})
        assert json.loads(answer.read_text()) == {"ms": 7}
        return {"ms": 7, "parts": {}}

    timers = []
    monkeypatch.setattr(engine, "measured_by", measured_by)
    monkeypatch.setattr(engine, "Timer", lambda *a: timers.append(a) or Mock())
    monkeypatch.setattr(engine.sys, "argv", ["engine", "{}", str(answer)])
    engine.main()
    assert json.loads(answer.read_text()) == {"ms": 7, "parts": {}}
    assert timers == [(engine.ENDING_SECONDS, engine.os._exit, (0,))]
