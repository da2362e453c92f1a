# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The plan's bytes are those really allocated; what does not fit is refused before
loading, and `auto` takes the largest N that leaves the KV cache its room."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.platforms import current_platform

from tests.support import ROOT
from tests.support.command_line import moe_prefetch, moe_prefetch_here
from tests.support.engine import moe_layers, start
from tests.support.sample import (
    make_dbrx,
    make_dense,
    make_gpt_oss,
    make_narrow,
)
from tools.sizing_table import write
from vllm.model_executor.layers.fused_moe.expert_slots.capacity.host_memory import (
    HostMemory,
    host_memory,
)
from vllm.model_executor.layers.fused_moe.expert_slots.capacity.planner import (
    GIB,
    Footprint,
    Limits,
    MemoryPlanner,
    MoELayer,
    distinct_experts,
)
from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError

MIB = 1 << 20


def planner(gpu_bytes=10 * GIB, stages=1, **limits):
    """64 experts of 10 MiB in 4 layers, top-4; 1 GiB of other weights, 100 MiB a
    sequence."""
    footprint = Footprint(
        layers=(MoELayer(64, 4, (("w13", 6 * MIB), ("w2", 4 * MIB))),) * 4,
        other_weight_bytes=GIB,
        kv_sequence_bytes=100 * MIB,
        kv_block_bytes=MIB,
        activation_bytes=200 * MIB,
    )
    defaults = {
        "gpu_limit": "the GPU",
        "kv_cache_bytes": None,
        "host": None,
        "host_reserve": 8 * GIB,
        "ranks_per_host": stages,
        "host_is_device": False,
        "page": 2 * MIB,
        "max_num_seqs": 8,
        "max_model_len": 4096,
        "shortens": False,
        "rows_per_sequence": 1,
    }
    return MemoryPlanner([footprint] * stages, Limits(gpu_bytes, **(defaults | limits)))


def test_the_parts_of_a_plan_add_up():
    """GPU bytes are slots of every layer, one set of staging rows, other weights and
    overhead; the KV cache gets the rest."""
    plan = planner().plan(16)
    assert plan.slot_bytes == 4 * 16 * 10 * MIB
    assert plan.staging_bytes == (64 - 16) * 10 * MIB
    experts = plan.slot_bytes + plan.staging_bytes
    assert plan.gpu_bytes == experts + plan.other_weight_bytes + plan.overhead_bytes
    assert plan.gpu_bytes + plan.kv_cache_bytes == 10 * GIB
    assert plan.host_bytes == 4 * 64 * 10 * MIB
    assert plan.fits and plan.kv_sequences == pytest.approx(
        (plan.kv_cache_bytes / MIB - 1) / 100
    )


def test_full_residency_has_no_host_store():
    """N = E and above: every expert on the GPU, nothing in the store."""
    plan = planner(20 * GIB).plan(100)
    assert (
        plan.slots == 64
        and plan.host_bytes == 0
        and plan.slot_bytes == 4 * 64 * 10 * MIB
    )
    assert plan.staging_bytes == 0


def test_what_is_lost_at_the_edges_of_pages_is_counted():
    """Rows that are no multiple of a page, and tensors too small to share one."""
    layer = MoELayer(8, 2, (("weight", 3 * MIB), ("scale", 100)))
    footprint = Footprint((layer,) * 3, 0, 0, 0, 0)
    # Of five staged rows, 15 MiB, seven pages are shared; 10 MiB of the last four rows
    # are private.
    assert (
        footprint.staging_bytes(3, 2 * MIB) == (14 + 3 * (10 - 9)) * MIB + 3 * 5 * 100
    )


@given(
    gpu_mib=st.integers(1500, 8000),
    max_num_seqs=st.integers(1, 64),
    rows=st.integers(1, 6),
    kv_mib=st.none() | st.integers(50, 2000),
)
def test_auto_is_the_largest_n_that_leaves_the_kv_cache_its_room(
    gpu_mib, max_num_seqs, rows, kv_mib
):
    """The rule of the docs, restated: workload, at most half of the free memory, at
    least one."""
    kv_bytes = None if kv_mib is None else kv_mib * MIB
    asked = planner(
        gpu_mib * MIB,
        max_num_seqs=max_num_seqs,
        rows_per_sequence=rows,
        kv_cache_bytes=kv_bytes,
    )
    smallest = min(64, 4 * rows)
    if not asked.plan(smallest).fits:
        with pytest.raises(MoEPrefetchError, match="auto does not fit"):
            asked.auto()
        return
    free = gpu_mib - 1024 - 200 - 512
    room = max(101, min(100 * max_num_seqs + 1, free / 2)) if kv_mib is None else kv_mib
    # Each slot more takes a row in four layers and saves one of staging.
    expected = max(smallest, min(64, int((free - room - 640) // 30)))
    assert asked.auto() == expected
    assert asked.plan(expected).fits


@given(gpu_mib=st.integers(1000, 8000))
def test_whatever_fits_fits_with_fewer_slots(gpu_mib):
    """`largest` is a boundary: every N up to it fits, no N above."""
    asked = planner(gpu_mib * MIB)
    largest = asked.largest() or 3
    assert [asked.plan(n).fits for n in range(4, 65)] == [
        n <= largest for n in range(4, 65)
    ]


@pytest.mark.parametrize(
    ("limits", "slots", "message"),
    [
        ({"gpu_bytes": 4 * GIB}, 60, "The largest N that fits is 53"),
        ({"gpu_bytes": 2 * GIB}, 40, "not even 4 .* --gpu-memory-utilization"),
        (
            {"kv_cache_bytes": 50 * MIB},
            8,
            "4,096 tokens take 101.0 MiB .* 50.0 MiB are given",
        ),
        (
            {"gpu_bytes": 4 * GIB, "host": HostMemory(32 * GIB, 9 * GIB)},
            8,
            r"2\.50 GiB of host memory, 9\.00 GiB are available and 8\.00 GiB must .* "
            r"No N fits",
        ),
    ],
)
def test_a_refusal_says_what_is_needed_what_there_is_and_the_way_out(
    limits, slots, message
):
    """Each kind of shortage."""
    with pytest.raises(MoEPrefetchError, match=message):
        planner(**limits).refuse(slots, slots)


def test_no_host_memory_is_asked_for_full_residency():
    """Where no store fits, N = E may."""
    asked = planner(20 * GIB, host=HostMemory(32 * GIB, 9 * GIB))
    assert not asked.plan(63).fits and asked.plan(64).fits and asked.largest() == 64


def test_every_rank_of_a_machine_needs_its_store():
    """Two stages with two tensor-parallel ranks each: four stores."""
    assert (
        planner(stages=2, ranks_per_host=4).plan(8).host_bytes == 4 * 4 * 64 * 10 * MIB
    )
    assert (
        planner(stages=2, ranks_per_host=2).plan(8).host_bytes == 2 * 4 * 64 * 10 * MIB
    )


def test_speculation_raises_what_a_batch_of_one_needs():
    """Three speculative tokens: four rows of top-4."""
    assert planner(rows_per_sequence=4).smallest == 16


def test_the_reserve_is_8_gib_or_a_tenth():
    """Whichever is more; or what the user says."""
    assert HostMemory(64 * GIB, 0).reserve() == 8 * GIB
    assert HostMemory(500 * GIB, 0).reserve() == 50 * GIB
    assert HostMemory(500 * GIB, 0).reserve(0.5) == GIB // 2


def group(directory, limit, usage, cache, v1=False):
    """A control group with a memory limit, as the kernel shows it."""
    names = ("memory.max", "memory.current", "inactive_file")
    if v1:
        names = (
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        )
    directory.mkdir(parents=True, exist_ok=True)
    (directory / names[0]).write_text(f"{limit}\n")
    (directory / names[1]).write_text(f"{usage}\n")
    (directory / "memory.stat").write_text(f"anon 5\n{names[2]} {cache}\n")


def test_the_tightest_control_group_counts(tmp_path):
    """cgroup v2: a parent's limit binds too; page cache that can be dropped is
    available."""
    group(tmp_path / "job", 4 * GIB, 3 * GIB, GIB)
    group(tmp_path / "job" / "task", "max", 2 * GIB, GIB)
    memory = host_memory(tmp_path, "0::/job/task\n")
    assert memory == HostMemory(4 * GIB, 2 * GIB)


def test_control_groups_of_version_1_and_inside_containers(tmp_path):
    """v1 has its own directory and names; in a container the named path does not
    exist."""
    group(tmp_path / "memory", 2 * GIB, GIB, 0, v1=True)
    assert host_memory(tmp_path, "5:memory:/docker/ab\n4:cpu:/\n") == HostMemory(
        2 * GIB, GIB
    )


def test_without_limits_the_machine_counts(tmp_path):
    """No control group, no limit."""
    import psutil

    assert host_memory(tmp_path, "").total == psutil.virtual_memory().total


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


def make_apart(make, directory):
    """In a process of its own: vLLM's transformers backend changes transformers'
    classes."""
    code = (
        "from pathlib import Path; from tests.support import sample; "
        f"sample.{make.__name__}(Path({str(directory)!r}))"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True
    )
    return directory


def measured(llm):
    """Bytes of slots, staging and store that a running engine really holds."""
    layers = moe_layers(llm)
    slots = sum(t.nbytes for layer in layers for t in layer.slots.rows.slots.values())
    (memory,) = {layer.slots.rows.memory for layer in layers}
    rows = [t for layer in layers for t in layer.slots.rows.tensors.values()]
    plain = [
        t.nbytes for t in rows if t.untyped_storage().data_ptr() not in memory._private
    ]
    staging = memory.committed + sum(plain) - slots
    store = sum(
        t.nbytes for layer in layers for t in layer.slots.store.tensors.values()
    )
    return slots, staging, store


MATRIX = {
    "qwen3-moe": (None, {}),
    "gpt-oss": (make_gpt_oss, {"dtype": "bfloat16"}),
    "dbrx": (make_dbrx, {"load_format": "dummy"}),
    "transformers backend": (None, {"model_impl": "transformers"}),
    "float32": (None, {"dtype": "float32"}),
    "padded width": (make_narrow, {}),
}


@pytest.mark.parametrize("name", MATRIX)
def test_predicted_bytes_are_the_allocated_bytes(
    checkpoint, tmp_path, name, monkeypatch
):
    """Slots, staging and store after loading, the other weights as the loader filled
    them."""
    from vllm.model_executor.model_loader import base_loader

    planned, others = [], []
    record_plans(monkeypatch, planned)
    process = base_loader.process_weights_after_loading

    def process_and_record(model, *args):
        experts = {id(p) for layer in model.modules() for p in experts_of(layer)}
        tensors = {id(t): t.nbytes for t in [*model.parameters(), *model.buffers()]}
        others.append(sum(n for i, n in tensors.items() if i not in experts))
        return process(model, *args)

    monkeypatch.setattr(
        base_loader, "process_weights_after_loading", process_and_record
    )
    make, arguments = MATRIX[name]
    model = make_apart(make, tmp_path / "model") if make else checkpoint
    llm = start(model, slots=6, **arguments)
    slots, staging, store = measured(llm)
    ((planner, plan),) = planned
    assert plan.slots == 6
    cache = llm.llm_engine.vllm_config.cache_config
    block = planner.footprints[0].kv_block_bytes
    allocated = sum(storage.nbytes() for storage in kv_caches(llm))
    assert allocated == cache.num_gpu_blocks * block
    assert plan.kv_cache_bytes - block < allocated <= plan.kv_cache_bytes
    assert (plan.slot_bytes, plan.staging_bytes) == (slots, staging)
    assert plan.host_bytes == store
    assert [plan.other_weight_bytes] == others
    del llm
    gc.collect()


def experts_of(module):
    if getattr(module, "load_coverage", None) is None:
        return []
    return [p for n, p in module.named_parameters(recurse=False) if n.startswith("w")]


def kv_caches(llm):
    """The tensors of the KV cache, each storage once."""
    caches = llm.llm_engine.model_executor.driver_worker.worker.model_runner.kv_caches
    storages = {
        cache.untyped_storage().data_ptr(): cache.untyped_storage() for cache in caches
    }
    return list(storages.values())


def record_plans(monkeypatch, planned):
    """Appends every plan that an engine starts with, and its planner."""
    settled = MemoryPlanner.refuse

    def refuse(self, slots, asked):
        settled(self, slots, asked)
        planned.append((self, self.plan(slots)))

    monkeypatch.setattr(MemoryPlanner, "refuse", refuse)


def give_device(monkeypatch, num_bytes):
    """Makes the CPU platform's device as large as a GPU would be."""
    monkeypatch.setattr(
        current_platform, "get_device_total_memory", lambda device_id=0: num_bytes
    )


def test_auto_settles_one_n_for_every_layer(checkpoint, monkeypatch, caplog_vllm):
    """A device with room for 11 slots a layer beside 1 GiB of KV cache: 11, and the log
    says so."""
    planned = []
    record_plans(monkeypatch, planned)
    llm = start(checkpoint, slots=8)
    planner, plan = planned[0]

    def room_for(slots):
        return planner.plan(slots).gpu_bytes + plan.kv_cache_bytes

    del llm
    gc.collect()
    give_device(monkeypatch, room_for(12) - 1)
    llm = start(checkpoint, slots="auto")
    assert {layer.num_slots for layer in moe_layers(llm)} == {11}
    assert "11 of 32 expert slots per MoE layer (auto: the largest" in caplog_vllm.text
    config = llm.llm_engine.vllm_config.additional_config
    assert config["moe_gpu_prefetch"] == 11
    del llm
    gc.collect()
    give_device(monkeypatch, room_for(20))
    with pytest.raises(
        MoEPrefetchError, match=r"22 does not fit.*The largest N that fits is 20"
    ):
        start(checkpoint, slots=22)


def test_a_start_is_refused_before_a_weight_is_read(checkpoint, tmp_path, monkeypatch):
    """The checkpoint's weights are garbage: reading them would be another error."""
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    (broken / "model.safetensors").write_bytes(b"not weights")
    give_device(monkeypatch, GIB)
    with pytest.raises(MoEPrefetchError, match="does not fit"):
        start(broken, slots=8)


def test_host_memory_is_kept_free(checkpoint):
    """A store that leaves less than the reserve is refused; the reserve is an
    option."""
    from vllm import LLM

    options = {
        "moe_gpu_prefetch": 8,
        "moe_gpu_prefetch_config": {"host_memory_reserve": 1e6},
    }
    with pytest.raises(MoEPrefetchError, match=r"1,000,000\.00 GiB must stay free"):
        LLM(str(checkpoint), max_model_len=512, additional_config=options)


def test_further_api_servers_do_not_ask_for_the_engines_memory(checkpoint, monkeypatch):
    """They make the same configuration when the engines have taken theirs, and plan
    nothing."""
    from vllm.engine.arg_utils import EngineArgs

    from vllm.plugins.moe_gpu_prefetch import register
    from vllm.plugins.moe_gpu_prefetch import start as start_up

    register()
    monkeypatch.setattr(start_up, "host_memory", lambda: HostMemory(64 * GIB, MIB))
    asked = {"moe_gpu_prefetch": 8}
    first = EngineArgs(str(checkpoint), max_model_len=512, additional_config=asked)
    with pytest.raises(MoEPrefetchError, match="must stay free"):
        first.create_engine_config()
    monkeypatch.setattr(start_up, "measure", None)
    further = EngineArgs(str(checkpoint), max_model_len=512, additional_config=asked)
    further._api_process_count, further._api_process_rank = 2, 1
    assert further.create_engine_config().additional_config == asked


def test_the_server_ends_with_one_clear_message(checkpoint):
    """`vllm serve` on a plan that does not fit: the reason, no traceback, no engine
    started."""
    result = subprocess.run(
        [
            *(str(Path(sys.executable).with_name("vllm")), "serve", str(checkpoint)),
            *("--moe-gpu-prefetch", "auto", "--gpu-memory-utilization", "0.01"),
        ],
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": ""},
    )
    assert result.returncode != 0
    assert (
        "vllm: error: --moe-gpu-prefetch auto does not fit: N=4 needs" in result.stderr
    )
    assert (
        "Traceback" not in result.stderr
        and "EngineCore" not in result.stderr + result.stdout
    )


def test_overflow_as_the_normal_case_is_warned_of(checkpoint, caplog_vllm):
    """`max_num_seqs` sequences need more experts than slots: the warning says what to
    change."""
    llm = start(checkpoint, slots=8, max_num_seqs=64)
    expected = distinct_experts(32, 4, 64)
    assert f"needs about {expected:.0f} distinct experts" in caplog_vllm.text
    assert (
        "Lower --max-num-seqs to 2, or raise --moe-gpu-prefetch to 32"
        in caplog_vllm.text
    )
    del llm
    caplog_vllm.clear()
    llm = start(checkpoint, slots=8, max_num_seqs=2)
    assert "Lower --max-num-seqs" not in caplog_vllm.text
    assert "Distinct experts expected in a step: 4 at 1, 13 at 4" in caplog_vllm.text
    del llm
    gc.collect()


@pytest.mark.parametrize("slots", [8, "auto"])
def test_a_model_that_cannot_be_measured(checkpoint, monkeypatch, caplog_vllm, slots):
    """A number starts with a warning that nothing was checked; `auto` has nothing to go
    by."""
    from vllm.model_executor.layers.fused_moe.expert_slots.capacity import footprint

    def fail(*args, **kwargs):
        raise RuntimeError("no such layer")

    monkeypatch.setattr(footprint, "initialize_model", fail)
    if slots == "auto":
        with pytest.raises(MoEPrefetchError, match=r"no such layer.*Give a number"):
            start(checkpoint, slots=slots)
        return
    llm = start(checkpoint, slots=slots)
    assert "No memory plan" in caplog_vllm.text and "no such layer" in caplog_vllm.text
    del llm
    gc.collect()
    torch.set_default_dtype(torch.float32)
