# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What of `benchmarks/gpu/` can run without a GPU: the command, and the checks of
memory."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import results
from benchmarks.gpu import proof, runs
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
        return lambda options: [run.append(name), {"check": name, "result": result}][1:]

    steps = {
        "memory": step("memory", "AssertionError: it is not"),
        "micro": step("micro", "ok"),
    }
    kept = results.folder(tmp_path)  # while this machine is known to have no GPU
    monkeypatch.setattr(proof, "STEPS", steps)
    monkeypatch.setattr(proof.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(proof.torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(runs, "results_folder", lambda: kept)
    monkeypatch.setattr(sys, "argv", ["proof.py", "all"])
    assert proof.main() == 1 and run == ["memory"]
    printed = capsys.readouterr().out
    assert "it is not" in printed and "FAILED: memory" in printed
    steps["memory"] = step("memory", "ok")
    assert proof.main() == 0 and run == ["memory", "memory", "micro"]
    assert "passed" in capsys.readouterr().out
    steps["memory"] = lambda options: 1 / 0
    steps["exact"] = lambda options: [{"result": "run exact again, for stock"}]
    assert proof.main() == 1
    monkeypatch.setattr(sys, "argv", ["proof.py", "exact"])
    assert proof.main() == 1
    printed = capsys.readouterr().out
    assert "ZeroDivisionError" in printed and "FAILED: exact" in printed
