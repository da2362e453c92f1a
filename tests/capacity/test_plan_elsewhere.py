# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""`plan` answers for a GPU on another machine as vLLM there would, and refuses what the
engine there refuses."""

import json
from pathlib import Path

import pytest
from transformers import Dots1Config

from tests.support.command_line import moe_prefetch
from tests.support.plan_elsewhere import ask
from tests.support.published_formats import BYTES, QUANTISED, QUARK_STATIC
from tools.sizing_models import QUANTISED_MODELS
from tools.sizing_table import (
    FEW_OPTIONS,
    LARGE_GPUS,
    OPTIONS,
    SMALL_GPUS,
    cell,
    quantised_cell,
    write,
)
from vllm.model_executor.layers.fused_moe.expert_slots.sizes import GIB
from vllm.plugins.moe_gpu_prefetch.command.gpu_elsewhere import GPUS, gpu_called

QUANTISED_CELLS = [
    ("RTX 3060", "gpt-oss-20b, MXFP4"),
    ("RTX 3090", "Qwen3-30B-A3B, FP8 (blocks)"),
    ("RTX A6000", "DeepSeek-V3, INT4 (AWQ)"),
]
SIZING = Path(__file__).resolve().parents[2] / "docs" / "sizing.md"


def configured(directory, name, model="Qwen3-30B-A3B", **changes):
    """One of the published configurations, with other values; None takes one away."""
    path = write(model, directory / name) / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(config))
    return str(path.parent)


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What `plan --gpu 4090 ARGUMENTS` says, by name."""
    place = tmp_path_factory.mktemp("elsewhere")
    small = {"num_hidden_layers": 4}
    qwen = configured(place, "qwen")
    few = configured(place, "few", **small)
    dots = Dots1Config(
        architectures=["Dots1ForCausalLM"], n_routed_experts=128, num_experts_per_tok=6,
        n_shared_experts=2,
       
        hidden_size=4096, moe_intermediate_size=1408, num_attention_heads=32,
        dtype="bfloat16",
        num_hidden_layers=62, first_k_dense_replace=1, n_group=1, topk_group=1,
        max_position_embeddings=32768,
    )  # fmt: skip
    dots.save_pretrained(place / "dots")
    listed = place / "listed"
    listed.mkdir()
    (listed / "config.json").write_text("[1, 2]")
    file = place / "serve.yaml"
    file.write_text(
        f"model: {few}\nmax-model-len: 2048\nport: 8123\nmoe-gpu-prefetch: 12\n"
    )
    kv = ["--kv-cache-memory-bytes", "2147483648", "--max-model-len", "4096", "--json"]
    questions = {
        "whole": [qwen, "--json", *OPTIONS, "--slots", "16", "--link", "25GB/s"],
        "table": [qwen, *OPTIONS, "--slots", "8GiB,auto"],
        "eager": [few, "--json", "--slots", "16", "--enforce-eager"],
        "graphs": [few, "--json", "--slots", "16", "--max_num_seqs", "256"],
        "file": ["--config", str(file), "--json"],
        "dots": [str(place / "dots"), "--json", "--slots", "8"],
        "nothing": [configured(place, "mixtral", "Mixtral-8x7B"), "--slots", "auto"],
        "cache given": [few, "--slots", "16", *kv],
        "two ranks": [few, "--slots", "16", "--tensor_parallel_size", "2", *kv],
        "resident": [
            configured(place, "resident", quantization_config=QUARK_STATIC, **small),
            *("--json", "--slots", "16,auto"),
        ],
        "static int8": [
            configured(place, "static int8", quantization_config=QUARK_STATIC)
        ],
        "quantised online": [few, "--slots", "16", "--quantization", "fp8"],
        "all of it": [few, "--gpu-memory-utilization", "1.0"],
        "slow link": [few, "--slots", "16,200", "--link", "1GB/s"],
        "gone": [str(place / "gone")],
        "no file": ["--config", str(place / "gone.yaml")],
        "no model": [],
        "listed": [str(listed)],
        "null": [configured(place, "null", num_experts=None)],
        "contradiction": [configured(place, "strict", layer_types=["full_attention"])],
        "top-k 0": [configured(place, "none", num_experts_per_tok=0, **small)],
        "top-k 200": [configured(place, "many", num_experts_per_tok=200, **small)],
        "LoRA": [few, "--enable-lora"],
        "replicas": [few, "--data_parallel_size", "2"],
    }
    for name, quantisation in QUANTISED.items():
        model, types = "Qwen3-30B-A3B", {}
        if name == "gpt_oss_mxfp4":
            model = "gpt-oss-20b"
            types = {"layer_types": ["sliding_attention", "full_attention"] * 2}
        directory = configured(
            place, name, model, quantization_config=quantisation, **small, **types
        )
        questions[name] = [directory, "--json", "--slots", "16"]
    questions["fp8 on an A100"] = ["A100-40", *questions["fp8"]]
    for gpu, model in QUANTISED_CELLS:
        path = str(write(model, place))
        questions[f"{model} on {gpu}"] = [gpu, path, "--json", *FEW_OPTIONS]
        questions[f"{model} on {gpu}"] += ["--slots", "auto"]
    return ask(questions, place)


def plan_of(answer):
    assert answer.status == 0, answer.err
    (plan,) = json.loads(answer.out)
    return plan


def test_what_it_counts(answers):
    """By hand, for Qwen3-30B-A3B: an expert is three matrices of 2048 x 768 in
    bfloat16."""
    plan, expert = plan_of(answers["whole"]), 3 * 2048 * 768 * 2
    assert (plan["slots"], plan["experts"]) == (16, 128)
    assert (
        plan["slot_bytes"] == 48 * 16 * expert
        and plan["host_bytes"] == 48 * 128 * expert
    )
    assert 0 <= plan["staging_bytes"] - 112 * expert < 48 * 2 * 2 * (2 << 20)
    attention = 2048 * 128 * (32 + 2 * 4) + 32 * 128 * 2048
    router = 2048 * 128
    other = 2 * (2 * 151936 * 2048 + 48 * (attention + router))
    assert (
        abs(plan["other_weight_bytes"] / other - 1) < 0.01
    )  # norms and rotary tables beside
    parts = ("slot_bytes", "staging_bytes", "other_weight_bytes", "overhead_bytes")
    assert plan["gpu_bytes"] == sum(plan[part] for part in parts)
    parts = ("activation_bytes", "graph_bytes", "library_bytes")
    assert plan["overhead_bytes"] == sum(plan[part] for part in parts)
    layer = 2048 * (8 * (3 * 768 + 2048) + 8 * 2048) * 2  # 2,048 tokens at a time
    assert plan["activation_bytes"] == layer + 16 * 151936 * 20
    assert plan["gpu_bytes"] + plan["kv_cache_bytes"] == int(int(23.64 * GIB) * 0.92)
    assert plan["seconds_per_miss"] == expert / 25e9
    assert plan["bytes_per_token"] == pytest.approx(48 * 8 * (1 - 16 / 128) * expert)


def test_cuda_graphs_are_counted(answers):
    """51 sizes up to 512 piecewise and 35 up to 256 sequences whole, four layers
    each."""
    assert plan_of(answers["graphs"])["graph_bytes"] == (51 + 35) * 4 * (384 << 10)
    assert plan_of(answers["eager"])["graph_bytes"] == 0


def test_sizes_and_auto_in_the_table(answers):
    answer = answers["table"]
    assert answer.status == 0, answer.err
    assert (
        " auto │" in answer.out
        and "which are" in answer.out
        and "estimates" in answer.out
    )
    expert = 3 * 2048 * 768 * 2
    slots = int(answer.out.split("┩\n│")[1].split("│")[0].split()[0])
    assert (
        48 * slots + 128 - slots
        <= 8 * GIB / expert
        < 48 * (slots + 1) + 128 - slots + 10
    )


def test_what_vllm_serve_takes(answers):
    """A file with the model and options of the server alone; underscores."""
    plan = plan_of(answers["file"])
    assert plan["slots"] == 12 and plan["experts"] == 128


def test_the_transformers_backend_is_answered(answers):
    """62 layers, within the minutes of this test, because routers are traced once."""
    assert json.loads(answers["dots"].out)[0]["experts"] == 128


@pytest.mark.parametrize("name", BYTES)
def test_experts_count_as_they_are_processed(answers, name):
    """In published formats, on the GPU that was asked about."""
    plan = plan_of(answers[name])
    assert plan["slot_bytes"] == 4 * 16 * BYTES[name]
    assert plan["host_bytes"] == 4 * plan["experts"] * BYTES[name]


def test_processing_counts_while_the_weights_are_loaded(answers):
    """GPTQ is turned twice, then packed, and vLLM holds all four: of 128 MiB of a
    layer, which are processed at a time, and of one expert more. Unquantised experts,
    and FP8 where Triton runs it, stay in host memory."""
    assert plan_of(answers["eager"])["processing_bytes"] == 0
    assert plan_of(answers["fp8"])["processing_bytes"] == 0
    gptq = plan_of(answers["auto_gptq"])["processing_bytes"]
    at_a_time = (128 << 20) // BYTES["auto_gptq"]
    assert gptq / (at_a_time + 1) / BYTES["auto_gptq"] == pytest.approx(4, rel=0.02)


def test_a_slot_for_every_expert_is_stocks_way(answers):
    """Of a quantised model that fits as it is, with fewer slots refused."""
    plan = plan_of(answers["resident"])
    assert plan["slots"] == plan["experts"] == 128 and plan["asked"] == ["auto"]


def test_a_slow_link_is_warned_of(answers):
    """A row shows what it was asked for by; the column has its unit."""
    out = " ".join(answers["slow link"].out.split())
    assert "tokens/s ┃" in out and "│ 128 200 │" in out
    assert "Host-to-device: 1.00 GB/s given; an expert of 9.44 MB takes 9.44 ms." in out
    assert (
        "Host-to-device bandwidth is 1.00 GB/s; PCIe 3.0 x16 gives about 12 GB/s" in out
    )


def test_nothing_fits(answers):
    answer = answers["nothing"]
    assert answer.status == 1 and "No N fits." in answer.out


def test_a_given_kv_cache_leaves_out_the_context(answers):
    """Of two GPUs, each also leaves out the communication buffers."""
    answer, pair = (
        json.loads(answers[name].out)[0] for name in ("cache given", "two ranks")
    )
    assert answer["kv_cache_bytes"] == pair["kv_cache_bytes"] == 2 * GIB
    assert answer["slot_bytes"] == 2 * pair["slot_bytes"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("static int8", "Quark INT8 with static activation scales runs past"),
        ("quantised online", "Fp8PerTensorOnlineMoEMethod.* quantises while it loads"),
        ("listed", "its config.json is not a JSON object"),
        ("null", "num_experts"),
        ("gone", "no such directory"),
        ("no file", "gone.yaml"),
        ("no model", "name a model"),
        ("all of it", r"23\.14 GiB are free \(an estimate"),
        ("contradiction", "num_hidden_layers"),
        (
            "top-k 0",
            r"chooses 0 of 128 experts for a token, and the number must lie in 1 "
            r"\.\.\. 128",
        ),
        ("top-k 200", "chooses 200 of 128 experts"),
        ("LoRA", "cannot be combined with --enable-lora"),
        ("replicas", "cannot be combined with --data-parallel-size"),
    ],
)
def test_a_refusal_is_one_line(answers, name, words):
    """With the model's name, status 2, nothing on standard output, no traceback."""
    import re

    answer = answers[name]
    lines = answer.err.strip().splitlines()
    assert answer.status == 2 and answer.out == ""
    assert re.search(f"error: .*{words}", lines[-1]), answer.err
    assert len(lines) == 1 and len(lines[0]) < 700, answer.err


def test_the_gpu_is_named_or_sized():
    """The installed command. An unknown GPU is refused with the known names."""
    result = moe_prefetch("plan", "MODEL", "--gpu", "RTX 4711")
    assert result.returncode == 2 and result.stdout == ""
    assert (
        "--gpu RTX 4711 is none of T4, " in result.stderr
        and "--gpu-memory" in result.stderr
    )


@pytest.mark.parametrize(
    "text", ["4090", "rtx4090", "RTX 4090", "NVIDIA GeForce RTX 4090"]
)
def test_ways_to_name_a_gpu(text):
    gpu = gpu_called(text)
    assert gpu.name == "RTX 4090" and gpu.memory == int(GPUS["RTX 4090"][1] * GIB)


def row_of_the_docs(model):
    """The cells of its row in docs/sizing.md."""
    lines = SIZING.read_text(encoding="utf-8").splitlines()
    (row,) = [line for line in lines if line.startswith(f"| {model} |")]
    return row.strip("| ").split(" | ")[1:]


def test_a_cell_of_the_table_in_the_docs(tmp_path):
    """The page has the figures that the command prints."""
    model = "Qwen3-30B-A3B"
    assert cell(write(model, tmp_path), "RTX 4090") == row_of_the_docs(model)[0]


@pytest.mark.parametrize(("gpu", "model"), QUANTISED_CELLS)
def test_cells_of_quantised_models_in_the_docs(answers, gpu, model):
    """Also where a GPU has no FP8 in hardware, so that experts take other bytes."""
    printed = quantised_cell(plan_of(answers[f"{model} on {gpu}"]))
    gpus = SMALL_GPUS if model in QUANTISED_MODELS else LARGE_GPUS
    assert row_of_the_docs(model)[gpus.index(gpu)] == printed


def test_latent_attention_takes_more_than_its_parameters(answers):
    """vLLM keeps the projection of the latent in bfloat16 beside the quantised one, and
    makes keys and values of 64k tokens of context in its profile run."""
    plan = plan_of(answers["DeepSeek-V3, INT4 (AWQ) on RTX A6000"])
    hidden, heads, projection = 7168, 128, 512 * 128 * 256
    attention = (
        hidden * 1536
        + 1536 * heads * 192
        + hidden * 576
        + projection
        + heads * 128 * hidden
    )
    int4 = 61 * attention + 3 * 3 * hidden * 18432 + 58 * 3 * hidden * 2048
    bfloat16 = 61 * projection + 2 * 129280 * hidden + 58 * 256 * hidden
    weights = int4 * (1 / 2 + 2 / 128 + 1 / 256) + 2 * bfloat16
    assert plan["other_weight_bytes"] == pytest.approx(weights, rel=0.01)
    context = 8 * 8192 * heads * 256 * 2
    assert plan["activation_bytes"] == context + 4 * 129280 * 20
