# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Servers that are told to end, and servers that lose a process: as stock, and nothing
is left."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.support.server import Server, alive, all_serving, start_pair
from vllm.model_executor.layers.fused_moe.expert_slots import counters

GONE_S = 60
TOKENS = 400


def assert_nothing_is_left(
    processes: list[psutil.Process], directories: set[Path]
) -> None:
    end = time.monotonic() + GONE_S
    while alive(processes) and time.monotonic() < end:
        time.sleep(0.2)
    assert not alive(processes)
    assert not any(directory.exists() for directory in directories)


def stream(
    server: Server, number: int, started: threading.Barrier
) -> tuple[str, str | None]:
    """The text of one long stream and why it ended; `started` is told of its first
    piece."""
    events = server.client().completions.create(
        model="sample",
        prompt=f"{number} You may reproduce and distribute copies of the Work",
        max_tokens=TOKENS,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    text, reason = "", None
    for number_received, event in enumerate(events):
        text += event.choices[0].text
        reason = event.choices[0].finish_reason
        if number_received == 0:
            started.wait(timeout=120)
    return text, reason


@pytest.mark.exhaustive
def test_sigterm_drains(servers):
    """With --shutdown-timeout, requests in flight are answered in full, as stock's are,
    and the server ends with stock's status; its processes and its counters are gone."""
    ends = []
    for server in servers:
        processes, directories = server.tree(), server.counter_directories()
        started = threading.Barrier(5)
        with ThreadPoolExecutor(4) as pool:
            answers = [
                pool.submit(stream, server, number, started) for number in range(4)
            ]
            started.wait(timeout=120)
            server.process.send_signal(signal.SIGTERM)
            texts = [answer.result(timeout=240) for answer in answers]
        ends.append((texts, server.process.wait(120)))
        assert_nothing_is_left(processes, directories)
    assert ends[0] == ends[1]
    texts, status = ends[0]
    assert status == 0 and all(reason == "length" for _, reason in texts)


@pytest.fixture(scope="module")
def victims(checkpoint, tmp_path_factory):
    """By the name of the process that each will lose: slots, and stock."""
    logs = tmp_path_factory.mktemp("victims")
    options = ("--max-model-len", "512", "--enforce-eager")
    pairs = {
        name: start_pair(checkpoint, logs / name, *options)
        for name in ("VLLM::Worker", "VLLM::EngineCore")
    }
    with all_serving([server for pair in pairs.values() for server in pair]):
        yield pairs


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("VLLM::Worker", "died unexpectedly"),
        ("VLLM::EngineCore", "engine core exited unexpectedly"),
    ],
)
def test_a_lost_process_ends_the_server(victims, name, message):
    """kill -9 of a worker or of the engine: the log says it and the server ends, with
    the status that stock ends with (0 in vLLM 0.32); its processes and its counters are
    gone."""
    statuses = []
    for server in victims[name]:
        processes, directories = server.tree(), server.counter_directories()
        [process] = [one for one in processes if one.name() == name]
        process.kill()
        statuses.append(server.process.wait(GONE_S))
        assert message in server.log.read_text(errors="replace")
        assert_nothing_is_left(processes, directories)
    slots, stock = statuses
    assert slots == stock


def counters_of_another_process(then: str) -> str:
    """The directory of a process that opens one and goes on with the statement
    `then`."""
    code = f"import os\nfrom {counters.__name__} import open_counters_directory\n"
    code += f"print(open_counters_directory(), flush=True)\n{then}"
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, stdout=subprocess.PIPE, text=True, timeout=180
    ).stdout.strip()


def test_counters_of_a_killed_process_are_removed_by_the_next(monkeypatch):
    """And those of a living one are not."""
    monkeypatch.delenv(counters.DIRECTORY_VARIABLE, raising=False)
    abandoned = counters_of_another_process("os.kill(os.getpid(), 9)")
    assert os.path.isdir(abandoned)
    mine = counters.open_counters_directory()
    assert not os.path.exists(abandoned)
    gone = counters_of_another_process("")
    assert mine.is_dir() and gone and not os.path.exists(gone)
