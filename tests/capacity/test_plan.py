# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A plan's bytes are those that the engine allocates. What does not fit is refused
before loading. `auto` takes the largest N that leaves the KV cache its room."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from vllm.platforms import current_platform

from tests.support import ROOT
from tests.support.engine import moe_layers, start
from tests.support.sample import make_dbrx, make_gpt_oss, make_narrow
from vllm.model_executor.layers.fused_moe.expert_slots.capacity.host_memory import (
    HostMemory,
)
from vllm.model_executor.layers.fused_moe.expert_slots.capacity.planner import (
    CapacityPlanner,
    distinct_experts,
)
from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError
from vllm.model_executor.layers.fused_moe.expert_slots.sizes import GIB

MIB = 1 << 20


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
    slots = sum(
        t.nbytes for layer in layers for t in layer.slot_manager.rows.slot_rows.values()
    )
    (memory,) = {layer.slot_manager.rows.memory for layer in layers}
    rows = [t for layer in layers for t in layer.slot_manager.rows.tensors.values()]
    plain = [
        t.nbytes for t in rows if t.untyped_storage().data_ptr() not in memory._private
    ]
    staging = memory.committed + sum(plain) - slots
    store = sum(
        t.nbytes for layer in layers for t in layer.slot_manager.store.tensors.values()
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
    settled = CapacityPlanner.refuse

    def refuse(self, slots, asked):
        settled(self, slots, asked)
        planned.append((self, self.plan(slots)))

    monkeypatch.setattr(CapacityPlanner, "refuse", refuse)


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
    """They make the same configuration when the engines have taken their memory, so
    they plan nothing."""
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
    """With a number the engine starts with a warning that nothing was checked; `auto`
    is refused."""
    from vllm.model_executor.layers.fused_moe.expert_slots.capacity import stage

    def fail(*args, **kwargs):
        raise RuntimeError("no such layer")

    monkeypatch.setattr(stage, "initialize_model", fail)
    if slots == "auto":
        with pytest.raises(MoEPrefetchError, match=r"no such layer.*Give a number"):
            start(checkpoint, slots=slots)
        return
    llm = start(checkpoint, slots=slots)
    assert (
        "No capacity plan" in caplog_vllm.text and "no such layer" in caplog_vllm.text
    )
    del llm
    gc.collect()
    torch.set_default_dtype(torch.float32)
