# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The plan's limits are vLLM's own: the part of a GPU that vLLM may use, and how the
measuring process is started."""

import gc
import multiprocessing
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from vllm.engine.arg_utils import EngineArgs

from tests.support.engine import moe_layers, start
from vllm.model_executor.layers.fused_moe.expert_slots.capacity import (
    footprint,
    gpus,
    stage,
)
from vllm.model_executor.layers.fused_moe.expert_slots.capacity.footprint import (
    CannotMeasure,
)
from vllm.model_executor.layers.fused_moe.expert_slots.capacity.gpus import GpuMemory
from vllm.model_executor.layers.fused_moe.expert_slots.capacity.host_tables import (
    HostTables,
)
from vllm.model_executor.layers.fused_moe.expert_slots.capacity.plan import (
    Footprint,
    Limits,
    MoELayer,
)
from vllm.model_executor.layers.fused_moe.expert_slots.capacity.planner import (
    CapacityPlanner,
)
from vllm.model_executor.layers.fused_moe.expert_slots.config import (
    MoEPrefetchConfig,
    MoEPrefetchError,
)
from vllm.model_executor.layers.fused_moe.expert_slots.sizes import GIB
from vllm.plugins.moe_gpu_prefetch import register
from vllm.plugins.moe_gpu_prefetch import start as start_up

CUDA = SimpleNamespace(
    is_cuda=lambda: True,
    is_cpu=lambda: False,
    get_device_total_memory=lambda: 24 * GIB,
    get_device_name=lambda _: "NVIDIA GB10",
    is_integrated_gpu=lambda _: False,
    logical_device_id_to_visible_device_id=lambda rank: rank,
)


def asked(share=0.9, kv_cache=None, ranks=1):
    cache = SimpleNamespace(
        gpu_memory_utilization=share, kv_cache_memory_bytes=kv_cache
    )
    return SimpleNamespace(
        cache_config=cache, parallel_config=SimpleNamespace(world_size=ranks)
    )


@pytest.mark.parametrize(
    ("options", "gpu", "limit"),
    [
        ({}, None, 0.9 * 24),  # a share of the total, which the context is no part of
        ({}, GpuMemory(20 * GIB, 19 * GIB), 0.9 * 20),
        ({}, GpuMemory(20 * GIB, None), 0.9 * 20),  # ranks may run on other GPUs
        ({"kv_cache": GIB}, None, 23.5),  # all but the context
        ({"kv_cache": GIB, "ranks": 2}, None, 22.5),  # and the buffers of communication
        ({"kv_cache": GIB}, GpuMemory(20 * GIB, 19 * GIB), 19),  # read with a context
        ({"kv_cache": GIB, "ranks": 2}, GpuMemory(20 * GIB, 19 * GIB), 18),
    ],
)
def test_what_vllm_may_use(monkeypatch, options, gpu, limit):
    monkeypatch.setattr(gpus, "current_platform", CUDA)
    num_bytes, words = gpus.usable_memory(asked(**options), gpu)
    assert num_bytes == int(limit * GIB) and f"{limit:.2f} GiB" in words
    assert ("an estimate" in words) == (gpu is None and "kv_cache" in options)


@pytest.mark.parametrize("kv_cache", [None, GIB])
@pytest.mark.parametrize(
    ("share", "ranks", "gpu", "free", "lower"),
    [
        (0.9, 1, GpuMemory(24 * GIB, 12 * GIB), "12.00 GiB are free. Stop", "0.5."),
        (0.95, 2, GpuMemory(24 * GIB, 23 * GIB), "22.00 GiB are free. Stop", "0.91."),
        (1.0, 1, None, "23.50 GiB are free (an estimate: the total less", "0.97."),
        (0.95, 2, None, "22.50 GiB are free (an estimate", "0.93."),
    ],
)
def test_a_share_that_is_not_free(
    monkeypatch, kv_cache, share, ranks, gpu, free, lower
):
    """Other programs or CUDA itself use the GPU. vLLM refuses it too, once workers run,
    also if the KV cache is given in bytes."""
    monkeypatch.setattr(gpus, "current_platform", CUDA)
    with pytest.raises(MoEPrefetchError, match=r"asks for .* of 24\.00 GiB") as refusal:
        gpus.usable_memory(asked(share, kv_cache, ranks), gpu)
    assert free in str(refusal.value) and str(refusal.value).endswith(
        f"lower it to {lower}"
    )


def test_a_type_that_the_gpu_lacks(monkeypatch, checkpoint):
    """It is refused before a worker starts."""

    def refuse(dtype):
        raise ValueError("Bfloat16 is only supported on newer GPUs")

    vllm_config = EngineArgs(str(checkpoint), max_model_len=512).create_engine_config()
    platform = SimpleNamespace(**vars(CUDA), check_if_supports_dtype=refuse)
    monkeypatch.setattr(start_up, "current_platform", platform)
    with pytest.raises(MoEPrefetchError, match=r"Bfloat16 is only supported"):
        start_up.planner_for(vllm_config, MoEPrefetchConfig.validated(8, {}))


def on_gpus(monkeypatch, *memory, **platform):
    """This machine has GPUs of these (free, total) bytes."""
    accelerator = SimpleNamespace(
        device_count=lambda: len(memory), get_memory_info=lambda device: memory[device]
    )
    monkeypatch.setattr(gpus.torch, "accelerator", accelerator)
    monkeypatch.setattr(
        gpus, "current_platform", SimpleNamespace(**vars(CUDA) | platform)
    )


def of_ranks(ranks, backend="mp", ids=None):
    return SimpleNamespace(
        world_size=ranks,
        nnodes=1,
        distributed_executor_backend=backend,
        assigned_physical_gpu_ids=ids,
    )


def test_the_smallest_gpu_counts(monkeypatch):
    on_gpus(monkeypatch, (20, 24), (18, 24), (1, 24))
    assert gpus.smallest_gpu(of_ranks(2)) == GpuMemory(total=24, free=18)
    on_gpus(monkeypatch)
    assert gpus.smallest_gpu(of_ranks(2)) is None


def test_a_full_gpu_is_the_smallest(monkeypatch):
    """Nothing free is less than anything."""
    on_gpus(monkeypatch, (0, 24), (18, 24))
    assert gpus.smallest_gpu(of_ranks(2)) == GpuMemory(total=24, free=0)


def test_the_gpus_that_the_ranks_get(monkeypatch):
    """`--device-ids` names them. Where Ray and torchrun place the ranks is not known
    yet."""
    given = []
    monkeypatch.setattr(gpus, "set_assigned_physical_gpu_ids", given.extend)
    on_gpus(
        monkeypatch,
        (1, 24),
        (20, 24),
        logical_device_id_to_visible_device_id=lambda _: given[0],
    )
    assert gpus.smallest_gpu(of_ranks(1, ids=[1])).free == 20
    on_gpus(monkeypatch, (1, 24), (20, 24))
    for backend in ("ray", "external_launcher"):
        assert gpus.smallest_gpu(of_ranks(2, backend)) == GpuMemory(24, None)


def test_an_integrated_gpu_is_refused(monkeypatch):
    """It uses the host's memory, so slots would be second copies."""
    on_gpus(monkeypatch, (20, 24), is_integrated_gpu=lambda _: True)
    with pytest.raises(
        MoEPrefetchError, match=r"saves no memory on NVIDIA GB10.* Serve without"
    ):
        gpus.smallest_gpu(of_ranks(1))


def test_a_rank_with_fewer_experts_than_the_top_k():
    """Under expert parallelism every expert can have its slot, and a token needs a
    rank's share of the top-k."""
    layer = MoELayer(1, 2, (("w", 20 << 20),), share=1 / 8)
    rank = Footprint((layer,), GIB, 0, 0, 0)
    limits = dict(
        gpu_limit="", kv_cache_bytes=None, host=None, host_reserve=0, ranks_per_host=8,
        host_is_device=False, page=2 << 20, max_num_seqs=4, max_model_len=64,
        shortens=False, rows_per_sequence=1,
    )  # fmt: skip
    planner = CapacityPlanner([rank], Limits(gpu_bytes=24 * GIB, **limits))
    assert planner.largest() == planner.meant("1GiB") == planner.auto() == 1
    assert start_up.expectation(planner).endswith(
        "0 at 1, 1 at 4, 1 at 16, 1 at 64 sequences"
    )
    assert planner.layers_with(1) == [(1, 0.25, 1, 20 << 20)]


def test_the_process_is_started_as_vllm_starts_its_own(monkeypatch):
    """vLLM's rules cover Ray, WSL2 and an initialised CUDA."""
    spawn = multiprocessing.get_context("spawn")
    monkeypatch.setattr(footprint, "get_mp_context", lambda: spawn)
    monkeypatch.setattr(footprint, "current_platform", CUDA)
    assert footprint._context(elsewhere=False) is spawn
    assert footprint._context(elsewhere=True).get_start_method() == "fork"


def test_a_spawned_process_measures_the_same(checkpoint, monkeypatch):
    register()
    vllm_config = EngineArgs(str(checkpoint), max_model_len=512).create_engine_config()
    forked = footprint.measure(vllm_config)
    assert forked.footprints[0].layers and forked.objection is forked.bypassing is None
    monkeypatch.setattr(
        footprint, "_context", lambda _: multiprocessing.get_context("spawn")
    )
    assert footprint.measure(vllm_config) == forked


def test_a_model_of_another_plugin_is_measured_in_a_spawned_process(
    checkpoint, monkeypatch
):
    """A spawned process has loaded no plugin."""
    called = []
    monkeypatch.setattr(footprint, "load_general_plugins", lambda: called.append(1))
    monkeypatch.setattr(footprint, "_measure", lambda *_: called)
    sender = SimpleNamespace(send=lambda answer: answer)
    footprint._measure_and_send(None, None, sender)
    assert called == [1]


def test_an_error_behind_many_others_is_one_line(checkpoint, monkeypatch):
    """Formatting them all took minutes when tracing had recursed."""

    def fail(**_):
        error = ValueError("no\n such  layer " + 999 * "x")
        error.__context__ = RecursionError("behind it")
        raise error

    def walk(*_):
        raise AssertionError("the errors behind an error are walked")

    monkeypatch.setattr(stage, "initialize_model", fail)
    monkeypatch.setattr("traceback.TracebackException.__init__", walk)
    vllm_config = EngineArgs(str(checkpoint), max_model_len=512).create_engine_config()
    with pytest.raises(
        CannotMeasure, match=r"ValueError: no such layer x{300,}\.\.\.$"
    ):
        footprint.measure(vllm_config)


def test_wsl_is_refused_before_anything_starts(checkpoint, monkeypatch):
    register()
    platform = SimpleNamespace(
        **vars(CUDA)
        | {"is_cpu": lambda: True, "check_if_supports_dtype": lambda _: None}
    )
    monkeypatch.setattr(start_up, "current_platform", platform)
    monkeypatch.setattr(start_up, "pinning_objection", lambda: "the host can freeze")
    options = {"max_model_len": 512, "additional_config": {"moe_gpu_prefetch": 8}}
    with pytest.raises(
        MoEPrefetchError, match=r"--moe-gpu-prefetch 8: the host can freeze"
    ):
        EngineArgs(str(checkpoint), **options).create_engine_config()


@pytest.mark.parametrize(
    "slots", ["12", "12 Gib foo", "0GiB", "-3GiB", "GiB", 0, True, 1.5]
)
def test_what_is_neither_a_number_nor_a_size(slots):
    with pytest.raises(MoEPrefetchError, match=r"^--moe-gpu-prefetch "):
        MoEPrefetchConfig.validated(slots, {})


def test_slots_by_their_size(checkpoint, caplog_vllm):
    """The engine takes the largest N whose slots and staging fit into the size, and
    logs it."""
    size = 2_500_000
    llm = start(checkpoint, slots=f"{size}B")
    layers = moe_layers(llm)
    (slots,) = {layer.num_slots for layer in layers}
    rows = [layer.slot_manager.rows for layer in layers]
    taken = sum(r.slot_bytes for r in rows) + rows[0].memory.staging
    per_slot = (
        sum(r.store.bytes_per_expert for r in rows) - rows[0].store.bytes_per_expert
    )
    assert taken <= size < taken + per_slot + 8 * 4096
    assert (
        f"{slots} of 32 expert slots per MoE layer ({size}B: the largest"
        in caplog_vllm.text
    )
    del llm, layers, rows
    gc.collect()


def test_a_size_that_holds_no_slot(checkpoint):
    with pytest.raises(
        MoEPrefetchError, match=r"64KiB is too little: 4 slots .* Give at least"
    ):
        start(checkpoint, slots="64KiB")


def test_a_router_class_is_traced_once(monkeypatch):
    """A trace takes a second or two, and layers are alike."""
    from vllm.model_executor.models.transformers.fusers import moe as fusers

    traced = []
    monkeypatch.setattr(
        fusers, "trace", lambda module: traced.append(module) or len(traced)
    )
    stock = fusers.trace
    for backend, count in ((False, 4), (True, 2)):
        traced.clear()
        config = SimpleNamespace(using_transformers_backend=lambda of=backend: of)
        with stage._traced_once(config):
            graphs = [
                fusers.trace(module)
                for module in (nn.Linear(1, 1), nn.ReLU())
                for _ in "ab"
            ]
        assert len(traced) == count and fusers.trace is stock
    assert graphs == [1, 1, 2, 2]


def test_what_a_model_puts_into_host_memory_is_not_made():
    """A pinned table of 2 TB is counted and costs nothing; small tensors are real."""
    with torch.device("meta"), HostTables() as tables:
        table = torch.nn.Parameter(
            torch.empty(
                1 << 30, 1024, dtype=torch.bfloat16, device="cpu", pin_memory=True
            ),
            requires_grad=False,
        )
        large = torch.empty(1 << 40, dtype=torch.uint8, device="cpu")
        small, weight = torch.zeros(4, device="cpu"), torch.empty(8, 8)
    assert tables.num_bytes == (1 << 41) + (1 << 40)
    assert tables.hold(table) and tables.hold(large)
    assert not tables.hold(weight) and not tables.hold(small)
    assert weight.is_meta and small.tolist() == [0] * 4
