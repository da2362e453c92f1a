# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""`vllm-moe-prefetch plan` on this machine's platform, from a config.json alone."""

import json

import pytest

from tests.support.command_line import moe_prefetch, moe_prefetch_here
from tests.support.sample import make_dense
from tools.sizing_table import write


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """The proposal's model: its config.json and nothing else."""
    return write("gemma-4-26B-A4B", tmp_path_factory.mktemp("plan"))


GRID = {
    "0.50": ({16}, {32, 64}),
    "0.75": ({16, 32}, {64}),
    "0.95": ({16, 32, 64, 72}, {96}),
}
"""Of vLLM issue #41447, on 40 GB: the slots that started and those that failed."""


@pytest.mark.parametrize("utilization", GRID)
def test_the_proposals_grid(gemma, utilization):
    """What started there starts here; its failures fit or are refused with the largest
    N."""
    started, failed = GRID[utilization]
    slots = ",".join(map(str, sorted(started | failed)))
    arguments = [
        "--gpu-memory",
        "40GB",
        "--gpu-memory-utilization",
        utilization,
        "--json",
    ]
    arguments += ["--max-model-len", "4096", "--dtype", "bfloat16", "--slots", slots]
    result = moe_prefetch("plan", str(gemma), *arguments)
    assert result.returncode == 0, result.stderr
    plans = {plan["slots"]: plan for plan in json.loads(result.stdout)}
    assert set(plans) == started | failed
    assert all(plans[n]["fits"] for n in started)
    for n, plan in plans.items():
        assert plan["slot_bytes"] == 30 * n * 3 * 2816 * 704 * 2
        assert plan["host_bytes"] == 30 * 128 * 3 * 2816 * 704 * 2
        assert plan["fits"] or "there are" in plan["reason"]
    assert not plans[max(failed)]["fits"]


def test_the_table_is_printed_from_a_config_alone(gemma):
    """No weights, no tokenizer, no GPU; the rows hold both boundaries."""
    result = moe_prefetch(
        "plan", str(gemma), "--gpu-memory", "24GiB", "--max-model-len", "4096"
    )
    assert result.returncode == 0, result.stderr
    assert "30 MoE layers of 128 experts, top-8, 11,894,784 bytes each" in result.stdout
    assert (
        " auto │  yes" in result.stdout and "The largest N that fits: " in result.stdout
    )
    assert "8 at 1, 29 at 4, 82 at 16, 126 at 64" in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu-memory", "24Gips"], "'24Gips' is not a size like 24GiB"),
        (["--gpu-memory", "24"], "'24' has no unit: say 24GiB"),
        (["--slots", "8,many"], "'8,many' is not a list of counts"),
        (["--slots", "8,1MiB"], "8 slots per layer (the router's top-k) take "),
        (["--link", "fast"], "'fast' is not a bandwidth like 25GB/s"),
        (["--enable-lora"], "cannot be combined with --enable-lora"),
        (["--data_parallel_size", "2"], "cannot be combined with --data-parallel-size"),
        (
            ["--moe-gpu-prefetch-config.draft_slots", "2"],
            "draft_slots 2 was given without a draft",
        ),
        (["--link", "25Gb/s"], "'25Gb/s' is not a bandwidth like 25GB/s"),
        (
            ["--tensor-parallel-size", "3"],
            "must be divisible by tensor parallel size (3)",
        ),
    ],
)
def test_bad_input_to_the_command(gemma, arguments, message, monkeypatch, capsys):
    """Exit status 2, the value, nothing on standard output."""
    assert moe_prefetch_here(monkeypatch, "plan", str(gemma), *arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.out == ""


def test_a_dense_model_and_a_missing_one(tmp_path, monkeypatch, capsys):
    """Nothing to plan; said with the model's name."""
    dense = str(make_dense(tmp_path / "dense"))
    assert moe_prefetch_here(monkeypatch, "plan", dense) == 2
    assert f"{dense}: no MoE layers" in capsys.readouterr().err
    missing = str(tmp_path / "missing")
    assert moe_prefetch_here(monkeypatch, "plan", missing) == 2
    assert f"{missing}: " in capsys.readouterr().err


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2), (4, 2)])
def test_ranks_share_the_experts(gemma, tensor, pipeline, monkeypatch, capsys):
    """Tensor parallelism splits an expert, pipeline parallelism the layers; stores add
    up."""
    arguments = ["--max-model-len", "4096", "--slots", "16", "--json"]
    arguments += [
        "--gpu-memory-utilization",
        "1",
        "--tensor-parallel-size",
        str(tensor),
    ]
    arguments += ["--pipeline-parallel-size", str(pipeline)]
    moe_prefetch_here(
        monkeypatch, "plan", str(gemma), *arguments
    )  # it may not fit this machine
    (plan,) = json.loads(capsys.readouterr().out)
    width = (704 // tensor + 31) // 32 * 32  # stock's CPU kernel pads a rank's part
    expert = 3 * 2816 * width * 2
    assert plan["slot_bytes"] == 30 // pipeline * 16 * expert
    assert plan["host_bytes"] == 30 * 128 * expert * tensor
