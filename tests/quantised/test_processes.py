# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Quantised experts in slots where the engine runs in processes of its own: `vllm
serve` with an OpenAI client, and two ranks of tensor parallelism, which cut packed
tensors and scales in two."""

from pathlib import Path

import pytest

from tests.support import python_path
from tests.support.apart import run_apart
from tests.support.quantised import EXPERTS, LAYERS, make_quantised
from tests.support.server import all_serving, start_pair
from tests.support.without_amx import PLUGIN, kernel_is_here

pytestmark = pytest.mark.skipif(
    not kernel_is_here(), reason="this vLLM has no kernel of quantised experts"
)
GATES = {"PYTHONPATH": python_path(Path(PLUGIN))}


def test_a_server_equals_stocks(tmp_path):
    """Text and logprobs of completions; experts were loaded into slots."""
    checkpoint = make_quantised(tmp_path / "gptq", "gptq")
    arguments = ("--max-model-len", "256", "--enforce-eager")
    servers = start_pair(checkpoint, tmp_path / "logs", *arguments, slots=4, **GATES)
    answers = []
    with all_serving(servers):
        for server in servers:
            client = server.client()
            completion = client.completions.create(
                model="sample",
                prompt=["The licence grants", "a"],
                max_tokens=12,
                temperature=0,
                logprobs=3,
            )
            answers.append([(c.text, c.logprobs) for c in completion.choices])
        counted = servers[0].metrics()
    assert answers[0] == answers[1] and len(answers[0][0][0]) > 0
    assert counted["vllm:moe_prefetch_loads_total"] > 0


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["int4-ct", "gptq", "awq", "mxfp4"])
def test_two_ranks_equal_stocks(tmp_path, name):
    """FP8 is not compared: on two ranks of the CPU platform, stock's answers differ
    between two starts."""
    checkpoint = make_quantised(tmp_path / name, name)
    layout = {"environment": GATES, "tensor_parallel_size": 2}
    stock = run_apart(checkpoint, tmp_path / "stock.json", **layout)
    slotted = run_apart(checkpoint, tmp_path / "slots.json", slots=4, **layout)
    assert slotted.outputs == stock.outputs
    first, second = slotted.counters
    assert len(first) == LAYERS and first.keys() == second.keys()
    for rank in slotted.counters:
        for layer in rank.values():
            assert layer["slots"] == 4 and layer["loads"] > 0
            assert layer["store_bytes"] == layer["slot_bytes"] // 4 * EXPERTS
    assert slotted.residency[0] == slotted.residency[1]
