# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What of `benchmarks/gpu/` can run without a GPU."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import results
from benchmarks.gpu import engine, proof, serving
from tests.support import ROOT


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = [sys.executable, "-m", "benchmarks.gpu.proof", *arguments]
    return subprocess.run(script, capture_output=True, text=True, cwd=ROOT)


def test_help_and_the_refusal_without_a_gpu():
    help_text = command("--help")
    assert help_text.returncode == 0
    assert all(step in help_text.stdout for step in proof.STEPS)
    refused = command("all")
    assert refused.returncode == 2 and "no GPU here" in refused.stderr


@pytest.mark.parametrize("step", proof.NEEDS_GPU)
def test_a_step_that_needs_a_gpu_is_refused_by_name(step, monkeypatch, capsys):
    for arguments, text in (([], "no GPU here"), (["--cpu"], f"{step} needs a GPU")):
        monkeypatch.setattr(sys, "argv", ["proof.py", step, *arguments])
        with pytest.raises(SystemExit, match="2"):
            proof.main()
        assert text in capsys.readouterr().err


STAND_IN = """
import json
from tests.support.interpreter import keep_triton

keep_triton()

from benchmarks.gpu import memory as memory_checks
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.machine import Machine
from tests.support.fake_driver import FakeDriver, device_memory
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.driver import Driver


class StandIn(Machine):
    def memory(self):
        return device_memory(self.driver.module)

    def synchronise(self):
        pass

    def twice(self, work):
        work()
        work()


class Broken(FakeDriver):
    def cuMemHostUnregister(self, address):
        return (self.error.CUDA_SUCCESS,)  # it is not


for driver in (FakeDriver(), FakeDriver(supported=False), Broken()):
    print(json.dumps(memory_checks.run(StandIn(Driver(driver)))))
    assert not driver.used
"""


def test_the_memory_step_on_a_stand_in():
    """The checks pass on a driver that keeps the rules, with the kernels in the
    interpreter. One that fails says why, and the others run all the same."""
    done = subprocess.run(
        [sys.executable, "-c", STAND_IN],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    good, unsupported, broken = map(json.loads, done.stdout.splitlines()[-3:])
    assert [row["result"] for row in good] == ["ok"] * len(good) and len(good) == 11
    assert "no virtual memory management" in unsupported[1]["result"]
    assert len(unsupported) == len(good) and unsupported[0]["result"] == "ok"
    results = {row["check"].split(",")[0]: row["result"] for row in broken}
    assert any("registered" in result for result in results.values()), results
    assert broken[2]["result"] == "ok"


def test_a_failed_check_ends_all_and_sets_the_status(tmp_path, monkeypatch, capsys):
    run = []

    def step(name, result):
        return lambda cpu: [run.append(name), {"check": name, "result": result}][1:]

    steps = {
        "memory": step("memory", "AssertionError: it is not"),
        "micro": step("micro", "ok"),
    }
    kept = results.folder(tmp_path)  # while this machine is known to have no GPU
    monkeypatch.setattr(proof, "STEPS", steps)
    monkeypatch.setattr(proof.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(serving, "results_folder", lambda: kept)
    monkeypatch.setattr(sys, "argv", ["proof.py", "all"])
    assert proof.main() == 1 and run == ["memory"]
    printed = capsys.readouterr().out
    assert "it is not" in printed and "FAILED: memory" in printed
    steps["memory"] = step("memory", "ok")
    assert proof.main() == 0 and run == ["memory", "memory", "micro"]
    assert "passed" in capsys.readouterr().out


UNION = 23.1
"""Experts that eight sequences of Qwen1.5-MoE need: `unions` of
benchmarks/routing/published.py, whose import compiles."""

REQUEST = {
    **{"model": serving.TINY | {"experts": 60}, "tokens": 4},
    **{"routing": "topics-qwen1.5", "batches": [2, 8]},
    **{"prefills": [24], "max_model_len": 128, "max_num_seqs": 8},
    **{"serving": (2, 8, 4)},
    "options": {"enforce_eager": True, **serving.slots_option(8)},
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
    rate = 1e6
    rows = serving.speed_rows("N = 8", "topics", measured, measured, rate)
    assert [row["what"] for row in rows] == [
        "decode, batch 2",
        "decode, batch 8",
        "prefill 24",
    ]
    assert rows[0]["of stock"] == 1 and rows[0]["bound ms"] > rows[0]["ms"]
    failed = serving.speed_rows(
        "N = 96", "topics", {"failed": "out of memory"}, measured, 1
    )
    assert failed[0]["what"] == "failed: out of memory"


def test_a_failed_engine_is_a_result():
    failed = engine.run_engine({**REQUEST, "options": {"no_such_option": 1}})
    assert "no_such_option" in failed["failed"]


def test_a_second_run_measures_what_the_first_had_no_time_for(tmp_path, monkeypatch):
    """Each engine once; the rows compare with the first of their routing."""
    asked = []

    def run_engine(request):
        asked.append((request["name"], request["routing"]))
        step = {"ms": 2.0 if "additional_config" in request["options"] else 1.0}
        return {"decode": {"1": step}, "prefill": {}}

    monkeypatch.setattr(serving, "run_engine", run_engine)
    monkeypatch.setattr(serving, "WORK", tmp_path)
    monkeypatch.setattr(serving, "ENGINES_SECONDS", -1)
    with pytest.raises(StopIteration):
        serving.grid(True), next(iter(()))
    assert asked == []
    monkeypatch.setattr(serving, "ENGINES_SECONDS", 400)
    rows = serving.speed(True)
    once = list(asked)
    assert len(set(once)) == len(once) == 2 * (2 + 2)
    assert once[0][0] == "stock, resident" and once[3][0] == "stock, resident, again"
    assert serving.speed(True) == rows and asked == once
    ratios = {row["engine"]: row["of stock"] for row in rows}
    assert ratios["N = 8"] == 0.5 and ratios["stock, resident, again"] == 1
