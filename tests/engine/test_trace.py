# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A real engine records a trace: the answers stay as they are, and its counters follow
from the trace."""

import gc
import json

import pytest

from tests.support import wait_until
from tests.support.command_line import moe_prefetch
from tests.support.engine import PROMPTS, answers, sampling, start
from tests.support.server import serving
from tests.support.traces import check_counters
from vllm.model_executor.layers.fused_moe.expert_slots.config import (
    MoEPrefetchConfig,
    MoEPrefetchError,
)
from vllm.model_executor.layers.fused_moe.expert_slots.counters import TOTALS
from vllm.model_executor.layers.fused_moe.expert_slots.trace.reading import Trace


def check(trace):
    """It is whole and exact, also for `tune`."""
    assert len(trace.layers) == 4 and trace.platform == "cpu" and trace.link is None
    check_counters(trace)
    answer = moe_prefetch("tune", str(trace.path), "--json")
    [said] = json.loads(answer.stdout)["checks"]
    assert said.endswith("equals the engine's counters exactly, in 4 of 4 layers.")


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_the_engines_counters_follow_from_its_trace(
    checkpoint, tmp_path, eager, monkeypatch
):
    """Warm-up is not in it. A warm start is: the second engine's slots begin with what
    the first one left. Its trace takes the place of the first one's, which is kept."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    path, outputs = tmp_path / "a.trace", []
    for traced in ({"trace": str(path)}, {}, {"trace": str(path)}):
        llm = start(
            checkpoint,
            slots=8,
            policy="lfu",
            lfu_half_life=20,
            warm_start=str(tmp_path / "residents"),
            enforce_eager=eager,
            **traced,
        )
        outputs.append(answers(llm.generate(PROMPTS, sampling(12), use_tqdm=False)))
        counters = llm.collective_rpc("expert_slot_counters")[0]
        llm.llm_engine.model_executor.shutdown()
        del llm
        gc.collect()
        if traced:
            trace = Trace.read(path)
            assert trace.complete and trace.model == str(checkpoint)
            check(trace)
            for layer in trace.layers:
                engine = counters[layer.name]
                assert layer.totals == {name: engine[name] for name in TOTALS}
                assert layer.rows[0] == layer.top_k * 128  # a full chunk of the prefill
            assert trace.busy_seconds > 0 and trace.kv_bytes_per_token > 0
    assert outputs[0] == outputs[1] == outputs[2]
    first = Trace.read(path.with_name("a.trace.previous"))
    assert first.layers[0].start is None and trace.layers[0].start is not None


def test_a_server_that_is_killed_leaves_its_trace(checkpoint, tmp_path):
    """It was idle, so nothing is missing but the last frame. Of two tensor-parallel
    ranks, which need the same experts, one records."""
    path = tmp_path / "a.trace"
    options = ["--max-model-len", "512", "--enforce-eager", "--moe-gpu-prefetch", "8"]
    options += ["--moe-gpu-prefetch-config.trace", str(path)]
    options += ["--tensor-parallel-size", "2"]
    with serving(
        checkpoint, tmp_path / "log", *options, VLLM_CPU_OMP_THREADS_BIND="0|1"
    ) as server:
        client = server.client()
        client.completions.create(model="sample", prompt="Licensor", max_tokens=9)
        wait_until(lambda: Trace.read(path).layers[0].totals)
        for process in reversed(server.tree()):  # a worker ends well after its parent
            process.kill()
    trace = Trace.read(path)
    assert trace.ended == "interrupted"
    check(trace)
    assert [file.name for file in tmp_path.glob("a.trace*")] == ["a.trace"]


def test_a_trace_that_cannot_be_written_is_refused_before_weights_are_read(
    checkpoint, tmp_path
):
    with pytest.raises(MoEPrefetchError, match="a directory that does not exist"):
        start(checkpoint, slots=8, trace=str(tmp_path / "none" / "a.trace"))


def test_a_relative_name_is_of_the_front_ends_directory(parse, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ("--moe-gpu-prefetch-config.trace", "a.trace")
    config = parse("--moe-gpu-prefetch", "8", *options).create_engine_config()
    assert MoEPrefetchConfig.of(config).trace == str(tmp_path / "a.trace")
