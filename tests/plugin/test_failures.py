# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A refusal ends the command with one line, whatever process found it, and reaches a
script as an exception that says why; nothing is left behind. What is no refusal keeps
its traceback."""

import fcntl
import os
import shutil
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file, save_file

from tests.support import ROOT, python_path
from tests.support.server import ENVIRONMENT
from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError
from vllm.model_executor.layers.fused_moe.expert_slots.counters import (
    DIRECTORY_VARIABLE,
)
from vllm.plugins.moe_gpu_prefetch import failures, flag

REASON = "the checkpoint is incomplete: model.layers.2.mlp.experts"
GONE_S = 30


@pytest.fixture(scope="module")
def broken(checkpoint, tmp_path_factory):
    """The sample without one tensor of an expert: known once the weights have been
    read."""
    directory = tmp_path_factory.mktemp("broken") / "qwen3-moe"
    shutil.copytree(checkpoint, directory)
    (weights,) = directory.glob("*.safetensors")
    tensors = load_file(weights)
    kept = {
        n: t for n, t in tensors.items() if "layers.2.mlp.experts.7.up_proj" not in n
    }
    save_file(kept, weights, {"format": "pt"})
    return directory


def counter_directories() -> set[Path]:
    """Those that no living process holds."""
    found = set()
    for lock in Path("/dev/shm").glob("vllm-expert-slots-*/lock"):
        with lock.open("r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            found.add(lock.parent)
    return found


def processes_of(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("FAILURES_TEST") == mark:
                found.append(process)
        except psutil.Error:
            continue
    return found


def ended(
    *command: str | Path, stderr: int = subprocess.PIPE, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end, and sees that nothing of it is left."""
    mark, before = uuid.uuid4().hex, counter_directories()
    result = subprocess.run(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        timeout=300,
        env={**os.environ, **ENVIRONMENT, "FAILURES_TEST": mark, **environment},
        cwd=ROOT,
    )
    end = time.monotonic() + GONE_S
    while processes_of(mark) and time.monotonic() < end:
        time.sleep(0.2)
    assert not processes_of(mark)
    assert counter_directories() <= before
    return result


def test_a_server_whose_workers_refuse_ends_with_one_line(broken, tmp_path):
    """Two workers, the engine, the front end: the reason stands last, there is no
    traceback, and the shared stores that were being filled are gone."""
    stores = tmp_path / "stores"
    result = ended(
        *(
            Path(sys.executable).with_name("vllm"),
            "serve",
            broken,
            "--moe-gpu-prefetch",
            "8",
        ),
        *("--max-model-len", "512", "--enforce-eager", "--tensor-parallel-size", "2"),
        *("--host", "127.0.0.1", "--port", "0"),
        *("--moe-gpu-prefetch-config.shared_store", stores),
        VLLM_CPU_OMP_THREADS_BIND="0|1",
    )
    last = result.stderr.splitlines()[-1]
    assert result.returncode == 1 and last.startswith(f"vllm: error: {REASON}"), (
        result.stderr
    )
    assert result.stderr.count(REASON) == 1
    assert "Traceback" not in result.stderr + result.stdout
    assert "WorkerProc was terminated" in result.stdout  # it was a worker that found it
    assert not [
        path for path in stores.rglob("*") if path.is_file() and path.stat().st_size
    ]


SCRIPT = """
import sys
from pathlib import Path
from tests.support.engine import start

if __name__ == "__main__":
    for model in sys.argv[1:]:
        try:
            start(Path(model), slots=8, distributed_executor_backend="uni")
        except Exception as error:
            print(f"caught {type(error).__name__}: {error}")
        print("THE NEXT")
"""


def test_a_script_gets_the_reason_and_foreign_errors_keep_their_tracebacks(
    broken, checkpoint, tmp_path
):
    """The engine runs in a process of its own. A second engine, which fails for another
    reason, is not taken for refused: its error and its traceback are stock's."""
    foreign = tmp_path / "foreign"
    shutil.copytree(checkpoint, foreign)
    (foreign / "model.safetensors").write_text("no weights")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "PYTHONPATH": python_path(ROOT),
    }
    result = ended(
        sys.executable,
        "-u",
        script,
        broken,
        foreign,
        stderr=subprocess.STDOUT,
        **environment,
    )
    refused, foreign, _ = result.stdout.split("THE NEXT")
    assert (
        f"caught MoEPrefetchError: {REASON}" in refused and "Traceback" not in refused
    )
    assert "caught RuntimeError: Engine core initialization failed." in foreign
    assert "EngineCore failed to start" in foreign and "deserializing header" in foreign
    assert foreign.count("Traceback") > 0 and REASON not in foreign


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """A directory of an engine that another process has started."""
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path))
    monkeypatch.setattr(failures, "_front_end", os.getpid() + 1)
    return tmp_path


def failing(error):
    def start(*args):
        raise error

    return failures._telling(start)


def test_a_reason_goes_up_from_process_to_process(directory, monkeypatch):
    """Whole, over several lines; it is gone once the front end has it."""
    error = failures.ending(MoEPrefetchError("too large:\n24 GiB"))
    assert isinstance(error, SystemExit) and error.code == 1
    with pytest.raises(SystemExit):  # an engine, of its worker
        failing(RuntimeError("see above"))()
    monkeypatch.setattr(failures, "_front_end", os.getpid())
    with pytest.raises(MoEPrefetchError, match="too large:\n24 GiB") as told:
        failing(RuntimeError("see above"))()
    assert told.value.__suppress_context__ and not list(directory.iterdir())
    with pytest.raises(RuntimeError, match="see above"):
        failing(RuntimeError("see above"))()


@pytest.mark.parametrize("place", ["", "/no/such/directory", "full"])
def test_a_reason_that_cannot_be_left_is_raised(directory, monkeypatch, place):
    """With stock's tracebacks rather than not at all."""
    if place == "full":
        monkeypatch.setattr(
            Path, "write_text", lambda *args, **_: (_ for _ in ()).throw(OSError())
        )
    else:
        monkeypatch.setenv(DIRECTORY_VARIABLE, place)
    refusal = MoEPrefetchError("too large")
    assert failures.ending(refusal) is refusal
    with pytest.raises(RuntimeError, match="see above"):
        failing(RuntimeError("see above"))()


def test_the_front_end_raises_what_it_finds_itself(directory, monkeypatch):
    monkeypatch.setattr(failures, "_front_end", os.getpid())
    refusal = MoEPrefetchError("too large")
    assert failures.ending(refusal) is refusal and not list(directory.iterdir())


def test_only_refusals_are_shown_in_one_line(monkeypatch, capsys):
    """A message of several lines as well; whatever else ends the process goes to the
    hook that was there."""
    shown = []
    monkeypatch.setattr(
        sys, "excepthook", lambda kind, error, stack: shown.append(error)
    )
    failures.show_refusals_in_one_line()
    failures.show_refusals_in_one_line()
    foreign = ValueError("other")
    sys.excepthook(ValueError, foreign, None)
    sys.excepthook(MoEPrefetchError, MoEPrefetchError("too large:\n  24 GiB"), None)
    assert (
        shown == [foreign]
        and capsys.readouterr().err == "vllm: error: too large: 24 GiB\n"
    )


def test_further_api_servers_tell_the_process_that_started_them(
    checkpoint, directory, monkeypatch
):
    """They open no directory of their own: a refusal of theirs goes where their parent
    looks."""
    from vllm.engine.arg_utils import EngineArgs

    from vllm.plugins.moe_gpu_prefetch import register
    from vllm.plugins.moe_gpu_prefetch import start as start_up

    def refuse(config, vllm_config):
        raise MoEPrefetchError("too large")

    register()
    monkeypatch.setattr(flag, "refuse_draft_slots", refuse)
    monkeypatch.setattr(start_up, "settle", lambda _: pytest.fail("planned"))
    monkeypatch.setattr(flag, "open_counters_directory", lambda: pytest.fail("opened"))
    further = EngineArgs(str(checkpoint), additional_config={"moe_gpu_prefetch": 8})
    further._api_process_count, further._api_process_rank = 2, 1
    with pytest.raises(SystemExit):
        further.create_engine_config()
    assert (directory / "refusal").read_text() == "too large"
