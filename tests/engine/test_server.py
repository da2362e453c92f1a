# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The real server and the real command line, asked by the real openai client."""

import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from examples import demo
from tests.docs.commands import python_of
from tests.support import ROOT
from tests.support.server import (
    ENVIRONMENT,
    Server,
    all_serving,
    serving,
    start_pair,
)
from vllm.model_executor.layers.fused_moe.expert_slots.counters import TOTALS

COMMON = (
    "--max-model-len",
    "512",
    "--enforce-eager",
    "--max-num-batched-tokens",
    "256",
)
TEXT = "You may reproduce and distribute copies of the Work "


@pytest.fixture(scope="module")
def servers(checkpoint, tmp_path_factory):
    """Eight slots, and stock; started together, for each takes most of a minute."""
    logs = tmp_path_factory.mktemp("servers")
    often = {"VLLM_LOG_STATS_INTERVAL": "1"}
    with all_serving(start_pair(checkpoint, logs, *COMMON, **often)) as pair:
        yield pair


def ask(server: Server, number: int = 0) -> list[object]:
    """One chat, one streamed chat and one completion with logprobs."""
    client = server.client()
    chat = {
        "model": "sample",
        "messages": [{"role": "user", "content": f"{TEXT} {number}?"}],
        "max_tokens": 16,
        "temperature": 0,
    }
    answer = client.chat.completions.create(**chat, logprobs=True, top_logprobs=2)
    stream = client.chat.completions.create(**chat, stream=True)
    pieces = [event.choices[0].delta.content or "" for event in stream if event.choices]
    completion = client.completions.create(
        model="sample",
        prompt=TEXT * (number % 5 + 1),
        max_tokens=16,
        temperature=0,
        logprobs=3,
    )
    chat_logprobs = answer.choices[0].logprobs.model_dump()
    completion_logprobs = completion.choices[0].logprobs.model_dump()
    assert len(pieces) > 1
    return [
        answer.choices[0].message.content,
        "".join(pieces),
        completion.choices[0].text,
        chat_logprobs,
        completion_logprobs,
    ]


def cancel(server: Server, number: int) -> None:
    """A stream that its client closes after the third piece."""
    stream = server.client().completions.create(
        model="sample",
        prompt=f"{number} {TEXT}",
        max_tokens=300,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    for received, _ in enumerate(stream):
        if received == 2:
            break
    stream.close()


def moe(server: Server) -> dict[str, int]:
    """Our samples of /metrics, summed over the layers."""
    prefix = "vllm:moe_prefetch_"
    samples = server.metrics().items()
    return {
        name.removeprefix(prefix): int(v)
        for name, v in samples
        if name.startswith(prefix)
    }


def test_answers_equal_stock(servers):
    """Chat, streaming and completions with logprobs are stock's."""
    slots, stock = servers
    assert [ask(slots, n) for n in range(4)] == [ask(stock, n) for n in range(4)]


def test_metrics_show_the_offload(servers):
    """/metrics has every counter and gauge; they move with a request and add up."""
    slots, stock = servers
    before = moe(slots)
    ask(slots, 17)
    after = moe(slots)
    for name in TOTALS:
        assert after[f"{name}_total"] > before[f"{name}_total"], name
    assert after["hits_total"] + after["misses_total"] == after["needed_total"]
    layers, experts, per_expert = 4, 32, 3 * 64 * 128 * 2
    assert after["slots"] == layers * 8
    assert after["slot_bytes"] == layers * 8 * per_expert
    assert after["store_bytes"] == layers * experts * per_expert
    assert after["bytes_loaded_total"] == after["loads_total"] * per_expert
    assert moe(stock) == {}


def lines_about_slots(server: Server) -> list[tuple[str, bool]]:
    """Each periodic line about the slots, and whether one of vLLM's is before it."""
    stock, ours = "Avg prompt throughput", "[log_line.py"
    lines = server.log.read_text().splitlines()
    periodic = [line for line in lines if stock in line or ours in line]
    return [
        (line.partition("Expert slots: ")[2], stock in before)
        for before, line in pairwise(["", *periodic])
        if ours in line
    ]


def test_a_line_about_the_slots_follows_vllms(servers):
    slots, stock = servers
    known = len(lines_about_slots(slots))
    ask(slots, 23)
    for _ in range(100):
        if len(written := lines_about_slots(slots)) > known:
            break
        time.sleep(0.2)
    assert len(written) > known
    for text, follows in written:
        assert follows and re.fullmatch(
            r"[\d.]+% hits( \(worst layer \d: [\d.]+%\))?, ([\d.]+ loads per layer and "
            r"step, [\d.]+% of them staged, [\d.e-]+ GB/s host-to-device|no loads)\.",
            text,
        ), text
    assert lines_about_slots(stock) == []


def test_the_example_client_prints_the_answer_and_the_hit_rate(servers):
    """examples/openai_client.py, on the server with slots and on stock's."""

    def printed(server: Server) -> list[str]:
        client = (sys.executable, str(ROOT / "examples" / "openai_client.py"))
        asked = (TEXT, "--url", server.url, "--max-tokens", "16")
        result = subprocess.run([*client, *asked], stdout=subprocess.PIPE, check=True)
        return result.stdout.decode().splitlines()

    (*answer, facts), (*stock, none) = map(printed, servers)
    assert answer == stock and any(answer)
    assert re.fullmatch(
        r"[\d.]+% of the experts needed were in slots; [\d,]+ loads, [\d,]+ bytes.",
        facts,
    )
    assert none == "The server reports no expert slots: it runs without them."


def test_the_python_of_the_readme(servers, capsys):
    """Asks the server with slots as it stands there, by this server's names."""
    text = "\n".join(python_of(ROOT / "README.md"))
    here = {"http://localhost:8000": servers[0].url, "Qwen/Qwen3-30B-A3B": "sample"}
    for printed, name in here.items():
        assert printed in text
        text = text.replace(printed, name)
    exec(text, {})
    assert capsys.readouterr().out.strip()


def test_the_demo(servers, checkpoint, tmp_path, monkeypatch, capsys):
    """`make demo`, on these servers: what it prints of equal answers, and its status
    where stock's are different."""
    started = iter([*servers, servers[0]])
    monkeypatch.setattr(demo, "start", lambda *_: next(started))
    monkeypatch.setattr(demo, "stop", lambda _: None)
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    monkeypatch.setattr(demo, "MODEL", checkpoint)
    assert demo.main() == 0
    printed = capsys.readouterr().out
    assert printed.count("yes, bit for bit") == 5 and "\nequal\n" in printed
    assert re.search(r"slots per MoE layer\W+8 of 32 experts", printed)
    [kept] = tmp_path.glob(".demo/stock-*.json")
    answers = json.loads(kept.read_text())
    kept.write_text(json.dumps(answers | {"chat": "other words"}))
    assert demo.main() == 1
    printed = capsys.readouterr().out
    assert printed.count("yes, bit for bit") == 4 and "DIFFERENT: chat" in printed


def test_sixteen_clients_with_streams_and_cancelled_requests(servers):
    """Under load every request is answered in full, cancelled ones leave nothing
    behind, and what is asked afterwards still equals stock."""
    slots, stock = servers
    with ThreadPoolExecutor(16) as pool:
        asked = [pool.submit(ask, slots, n) for n in range(24)]
        cancelled = [pool.submit(cancel, slots, n) for n in range(8)]
        answers = [future.result(timeout=300) for future in asked]
        for future in cancelled:
            future.result(timeout=300)
    assert all(
        len(answer[4]["tokens"]) > 0 and answer[0] == answer[1] for answer in answers
    )
    metrics = slots.metrics()
    assert metrics["vllm:num_requests_running"] == 0
    counters = moe(slots)
    assert counters["hits_total"] + counters["misses_total"] == counters["needed_total"]
    assert [ask(slots, n) for n in range(2)] == [ask(stock, n) for n in range(2)]


def vllm(*arguments: object, seconds: int = 240) -> str:
    """Runs the real `vllm` command and returns what it printed."""
    command = [str(Path(sys.executable).with_name("vllm")), *map(str, arguments)]
    environment = {**os.environ, **ENVIRONMENT}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    result = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
        env=environment,
    )
    assert result.returncode == 0, result.stdout[-4000:]
    return result.stdout


def assert_slots_in_log(text: str, slots: int, policy: str = "lfu") -> None:
    assert f"4 MoE layers, 32 experts top-4, {slots} slots each ({policy})" in text


def test_bench_serve(servers, checkpoint):
    """`vllm bench serve` drives the slotted server; its counters move."""
    slots, _ = servers
    before = moe(slots)["loads_total"]
    output = vllm(
        *("bench", "serve", "--base-url", slots.url, "--model", "sample"),
        *("--tokenizer", checkpoint, "--dataset-name", "random", "--num-prompts", 12),
        *("--random-input-len", 64, "--random-output-len", 8, "--max-concurrency", 4),
    )
    assert re.search(r"Successful requests:\s+12", output)
    assert moe(slots)["loads_total"] > before


def test_bench_throughput(checkpoint):
    """`vllm bench throughput` takes the flags and prints its figures."""
    output = vllm(
        *(
            "bench",
            "throughput",
            "--model",
            checkpoint,
            *COMMON,
            "--dataset-name",
            "random",
        ),
        *("--random-input-len", 32, "--random-output-len", 8, "--num-prompts", 8),
        *("--moe-gpu-prefetch", 8, "--moe-gpu-prefetch-config.policy", "lfu"),
    )
    assert re.search(r"Throughput: [\d.]+ requests/s, [\d.]+ total tokens/s", output)
    assert_slots_in_log(output, 8, "lfu")


@pytest.mark.exhaustive
def test_bench_latency(tmp_path):
    """`vllm bench latency` takes the flags and prints its figures. It draws token ids
    up to 10,000 whatever the vocabulary. The checkpoint is made by a process of its
    own, because vLLM's transformers backend changes transformers' classes in the
    processes that ran it."""
    checkpoint = tmp_path / "wide"
    make = (
        sys.executable,
        "-m",
        "tests.support.sample",
        str(checkpoint),
        "--vocabulary",
        "10000",
    )
    subprocess.run(make, check=True, cwd=ROOT)
    output = vllm(
        *("bench", "latency", "--model", checkpoint, *COMMON, "--moe-gpu-prefetch", 8),
        *("--input-len", 16, "--output-len", 4, "--batch-size", 2),
        *("--num-iters", 2, "--num-iters-warmup", 1),
    )
    assert "Avg latency" in output
    assert_slots_in_log(output, 8)


@pytest.mark.exhaustive
def test_run_batch(checkpoint, tmp_path):
    """`vllm run-batch` takes the flags and answers every line of the file."""
    body = {"model": str(checkpoint), "messages": [{"role": "user", "content": TEXT}]}
    lines = [
        {
            "custom_id": f"request-{n}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {**body, "max_tokens": 4 + n},
        }
        for n in range(3)
    ]
    questions, answers = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    questions.write_text("\n".join(map(json.dumps, lines)))
    output = vllm(
        *("run-batch", "-i", questions, "-o", answers, "--model", checkpoint),
        *(*COMMON, "--moe-gpu-prefetch", 8),
    )
    assert_slots_in_log(output, 8)
    responses = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [r["response"]["status_code"] for r in responses] == [200] * 3


@pytest.mark.exhaustive
def test_api_server_module_with_a_yaml_config(servers, checkpoint, tmp_path):
    """`python -m vllm.entrypoints.openai.api_server --config FILE` reads both options
    from YAML."""
    config = tmp_path / "config.yaml"
    options = {"moe-gpu-prefetch": 6, "moe-gpu-prefetch-config": {"policy": "lfu"}}
    config.write_text(yaml.safe_dump({**options, "model": str(checkpoint)}))
    module = (
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--config",
        str(config),
    )
    log = tmp_path / "api_server.log"
    with serving(checkpoint, log, *COMMON, command=module) as server:
        assert ask(server, 3) == ask(servers[1], 3)
        assert moe(server)["slots"] == 4 * 6
        assert moe(server)["overflow_steps_total"] > 0
    assert_slots_in_log(log.read_text(), 6, "lfu")
