# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Tensors of a role share their staging rows and nothing else, on both platforms, and
nothing is left of their memory."""

import errno
import gc
import os
import re
from pathlib import Path

import pytest
import torch

from tests.support.fake_driver import FakeDriver, device_memory
from tests.support.rows import nothing_left, rows_of
from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError
from vllm.model_executor.layers.fused_moe.expert_slots.cpu import memory as cpu_memory
from vllm.model_executor.layers.fused_moe.expert_slots.cpu.memory import CPUMemory
from vllm.model_executor.layers.fused_moe.expert_slots.weights.layout import split


@pytest.fixture(params=["host", "cuda"])
def backend(request):
    return request.param


def make(backend, **options):
    return CPUMemory() if backend == "host" else device_memory(FakeDriver(**options))


# Rows: a multiple of the page, smaller, larger with a remainder, tiny, many pages.
@pytest.mark.parametrize("row_bytes", [64 << 10, 4096, 5000, 66_000, 200, 300_001, 1])
@pytest.mark.parametrize("count,staged", [(8, 0), (8, 1), (8, 7), (64, 48), (5, 4)])
def test_staging_is_shared_and_slots_are_not(backend, row_bytes, count, staged):
    """Whole pages of the staged rows are shared with tensors of the same role, no other
    byte is."""
    memory = make(backend)
    tensors = [
        rows_of(memory, role, count, staged, row_bytes)
        for role in ("w", "w", "w", "w2")
    ]
    shared, private = split(count, staged, row_bytes, memory.page)
    for i, tensor in enumerate(tensors):
        tensor.fill_(i + 1)
    for i, tensor in enumerate(tensors):
        flat = tensor.flatten()
        assert (flat[shared:] == i + 1).all()
        assert (flat[:shared] == (4 if i == 3 else 3)).all()
    assert shared <= staged * row_bytes < shared + memory.page
    assert memory.committed == (2 * shared + 4 * private if shared else 0)
    if backend == "cuda":
        assert memory._driver.module.used == memory.committed


def test_a_step_of_every_layer_reads_what_it_loaded(backend):
    """The use: each layer loads staged rows and reads them before the next does; slots
    stay."""
    memory, generator = make(backend), torch.Generator().manual_seed(0)
    count, staged, row = 16, 11, 70_001

    def random(*shape):
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    layers = [rows_of(memory, "w", count, staged, row) for _ in range(24)]
    slots = [random(count - staged, row) for _ in layers]
    for layer, own in zip(layers, slots, strict=True):
        layer[staged:] = own
    for step in range(3):
        for layer, own in zip(layers, slots, strict=True):
            needed = torch.randperm(staged, generator=generator)[: 3 + 4 * step]
            layer[needed] = data = random(len(needed), row)
            assert torch.equal(layer[needed], data) and torch.equal(layer[staged:], own)


def test_several_engines_one_after_another(backend):
    """In a process that has memory for one."""
    driver = FakeDriver(memory=40 << 20)
    gc.collect()
    files = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        memory = CPUMemory() if backend == "host" else device_memory(driver)
        layers = [rows_of(memory, "w", 8, 6, 1 << 20) for _ in range(12)]
        layers[0].fill_(1)
        memory.close()
        assert layers[11][0, 0] == 1  # staging lives while mapped
        del layers
        gc.collect()
        assert memory.committed == 0 and len(os.listdir("/proc/self/fd")) == files
    assert nothing_left(driver)


def test_nothing_is_left_without_close(backend):
    driver = FakeDriver()
    gc.collect()
    files = len(os.listdir("/proc/self/fd"))
    memory = CPUMemory() if backend == "host" else device_memory(driver)
    tensor = rows_of(memory, "w", 8, 6, 1 << 16)
    del memory
    gc.collect()
    assert tensor.fill_(1)[-1, -1] == 1
    del tensor
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == files and nothing_left(driver)


def test_memory_lives_with_the_tensor(backend):
    """A view keeps it; then only the staging is left, until the memory is closed."""
    memory = make(backend)
    tensor = rows_of(memory, "w", 4, 2, 1 << 16)
    part = tensor[2, 5:9]
    del tensor
    gc.collect()
    assert part.fill_(7).sum() == 28 and memory.committed
    del part
    gc.collect()
    assert memory.committed == split(4, 2, 1 << 16, memory.page)[0]
    memory.close()
    assert memory.committed == 0
    with pytest.raises(AssertionError):
        rows_of(memory, "w", 4, 2, 1 << 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int32])
def test_a_tensor_like_any_other(backend, dtype):
    """A parameter can take it for its data."""
    memory = make(backend)
    tensor = memory.tensor("w", (8, 3, 50_000), dtype, staged=6)
    assert (
        tensor.shape == (8, 3, 50_000)
        and tensor.dtype == dtype
        and tensor.is_contiguous()
    )
    assert tensor.data_ptr() % memory.page == 0 and memory.committed
    parameter = torch.nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
    parameter.data = tensor
    del tensor
    gc.collect()
    parameter.data.fill_(2)
    assert (parameter.data[5].float() == 2).all()


def test_what_has_no_page_to_share_is_a_plain_tensor(backend):
    memory = make(backend)
    scales = memory.tensor("s", (8, 2), torch.float32, staged=6)
    assert scales.shape == (8, 2) and memory.committed == 0


@pytest.mark.parametrize("staged,count,row", [(8, 8, 10), (-1, 8, 10), (1, 8, 0)])
def test_bad_sizes(backend, staged, count, row):
    with pytest.raises(AssertionError):
        make(backend).rows("w", count, staged, row)


def test_staging_costs_the_largest_need_and_not_the_sum(backend):
    """Two shapes, two numbers of slots and a draft of one layer share one staging."""
    memory, page = make(backend), (4096 if backend == "host" else 64 << 10)
    model = [(64, 56, 2 * page), (64, 56, page), (64, 48, 2 * page), (32, 31, 2 * page)]
    tensors = [rows_of(memory, "w", *one) for one in model * 3]
    for i, tensor in enumerate(tensors):
        tensor[model[i % 4][1] :] = i
    private = 3 * sum(split(*one, page)[1] for one in model)
    assert (
        memory.committed - private == 118 * page
    )  # the needs: 112, 56, 96 and 62 pages
    for i, tensor in enumerate(tensors):
        assert (tensor[model[i % 4][1] :] == i).all()


def test_failure_of_the_host_leaves_nothing_behind(monkeypatch):
    real, mapped = cpu_memory.map_memory, []
    memory = CPUMemory()

    def failing(size, *arguments, **options):
        if options:
            raise MoEPrefetchError("no more mappings")
        mapped.append((real(size, *arguments), size))
        return mapped[-1][0]

    files = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(cpu_memory, "map_memory", failing)
    with pytest.raises(MoEPrefetchError, match="no more"):
        rows_of(memory, "w", 8, 6, 1 << 16)
    assert memory.committed == 0 and len(os.listdir("/proc/self/fd")) == files
    maps = Path("/proc/self/maps").read_text()
    ((address, _),) = mapped
    assert not re.search(rf"^{address:x}-", maps, re.M)


def test_more_host_memory_than_there_is_is_refused():
    with pytest.raises(
        MoEPrefetchError, match=r"cannot be mapped: Cannot allocate.*ulimit"
    ):
        CPUMemory().rows("w", 8, 0, 1 << 58)


def test_memory_files_cannot_be_run_where_the_kernel_knows_how(monkeypatch):
    """vm.memfd_noexec=2 refuses others; a kernel before 6.3 does not know the flag."""
    real, flags = os.memfd_create, []

    def old(name, given):
        flags.append(given)
        if given & 8:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(name, given)

    monkeypatch.setattr(os, "memfd_create", old)
    os.close(cpu_memory._memory_file())
    assert flags == [os.MFD_CLOEXEC | 8, os.MFD_CLOEXEC]

    def none_left(name, given):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "memfd_create", none_left)
    with pytest.raises(OSError, match="Too many"):
        cpu_memory._memory_file()


def test_host_memory_is_counted_once():
    """PSS counts a page shared by n mappings n times 1/n; RSS n times. That of files is
    left out: it grows when a process that maps the same libraries ends."""

    def taken():
        text = Path("/proc/self/smaps_rollup").read_text()
        kib = {k: int(v) for k, v in re.findall(r"^(\w+):\s+(\d+) kB", text, re.M)}
        return torch.tensor([kib["Pss_Anon"] + kib["Pss_Shmem"], kib["Rss"]]) << 10

    memory, before = CPUMemory(), taken()
    layers = [rows_of(memory, "w", 64, 48, 1 << 16) for _ in range(12)]
    for layer in layers:
        layer.fill_(1)
    grown, resident = (taken() - before).tolist()
    assert abs(grown - memory.committed) < 2 << 20, (grown, memory.committed)
    assert resident > 12 * (60 << 16)
