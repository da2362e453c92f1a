# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Staged rows are one memory, slots are not; it is as large as said, and nothing is
left of it."""

import ctypes
import errno
import gc
import os
import re
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.fake_driver import _NAMES, FakeDriver, _real, device_memory
from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError
from vllm.model_executor.layers.fused_moe.expert_slots.weights import (
    driver as driver_module,
)
from vllm.model_executor.layers.fused_moe.expert_slots.weights import elastic
from vllm.model_executor.layers.fused_moe.expert_slots.weights.driver import (
    Driver,
    DriverError,
    cuda_driver,
)
from vllm.model_executor.layers.fused_moe.expert_slots.weights.elastic import (
    DeviceMemory,
    HostMemory,
    committed_bytes,
    fit,
    split,
)


@pytest.fixture(params=["host", "cuda"])
def backend(request):
    return request.param


def make(backend, **options):
    return HostMemory() if backend == "host" else device_memory(FakeDriver(**options))


def rows_of(memory, role, count, staged, row_bytes):
    """A tensor of bytes."""
    return memory.tensor(role, (count, row_bytes), torch.uint8, staged)


def nothing_left(driver):
    gc.collect()
    return not (driver.used or driver.mappings or driver.reservations or driver.handles)


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
        memory = HostMemory() if backend == "host" else device_memory(driver)
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
    memory = HostMemory() if backend == "host" else device_memory(driver)
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


@pytest.mark.parametrize("row", [2, 50_000])
def test_device_memory_begins_at_zero(row):
    """Rows that nothing was loaded into may be computed on: never NaN."""
    memory = device_memory(FakeDriver())
    memory.tensor("w", (8, row), torch.float32, staged=6).fill_(float("nan"))
    assert not memory.tensor("w", (8, row), torch.float32, staged=6).any()


@pytest.mark.parametrize("staged,count,row", [(8, 8, 10), (-1, 8, 10), (1, 8, 0)])
def test_bad_sizes(backend, staged, count, row):
    with pytest.raises(AssertionError):
        make(backend).rows("w", count, staged, row)


# ---- the handles of staging ----


@given(needs=st.lists(st.integers(0, 3000), max_size=8))
def test_handles_fit_every_need(needs):
    """Exactly; equal needs use equal handles; one need adds few; all cost about the
    largest."""
    sizes, seen = [], {}
    for need in needs:
        taken, new = fit(sizes, need * 4096, 4096)
        handles = [*taken, *range(len(sizes), len(sizes) + len(new))]
        sizes += new
        assert sum(sizes[i] for i in handles) == need * 4096
        assert len(new) <= 16 and all(size and size % 4096 == 0 for size in sizes)
        assert seen.setdefault(need, handles) == handles
    largest = max(needs, default=0) * 4096
    waste = max((size for size in sizes), default=0)
    assert sum(sizes) <= largest + waste * max(0, len(set(needs)) - 1)


def test_the_first_need_makes_sixteen_handles_and_a_rest_makes_one():
    """Few to map for every tensor, and enough for another need to find most of its
    bytes."""
    page = 4096
    assert fit([], 162 * page, page) == ([], [11 * page] * 14 + [8 * page])
    assert fit([], 3 * page, page) == ([], [page] * 3)
    assert fit([11 * page] * 14, 27 * page, page) == ([0, 1], [5 * page])
    assert fit([page], 162 * page, page) == ([0], [11 * page] * 14 + [7 * page])


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


layouts = st.lists(
    st.tuples(
        st.sampled_from(["w13", "w2", "s"]),
        st.integers(2, 40),
        st.integers(0, 39),
        st.integers(1, 30_000),
    ).map(lambda one: (one[0], one[1], min(one[2], one[1] - 1), one[3])),
    max_size=12,
)


@settings(max_examples=40, deadline=None)
@given(layout=layouts)
@pytest.mark.parametrize("kind", ["host", "cuda"])
def test_the_plan_counts_what_is_committed(kind, layout):
    """From the sizes alone, plain tensors included."""
    memory = make(kind)
    tensors = [rows_of(memory, *one) for one in layout]
    shares = [split(*one[1:], memory.page)[0] > 0 for one in layout]
    plain = sum(
        t.numel() for t, shared in zip(tensors, shares, strict=True) if not shared
    )
    assert committed_bytes(layout, memory.page) == memory.committed + plain


# ---- the device's memory against the driver's rules ----


def test_a_device_without_virtual_memory_management_is_refused():
    with pytest.raises(
        MoEPrefetchError, match=r"GPU 0 has no virtual memory management.*without"
    ):
        device_memory(FakeDriver(supported=False))


def test_a_fractional_gpu_is_refused():
    """There the attribute says yes, and the first call no."""
    driver = FakeDriver()
    answer = driver.error.CUDA_ERROR_NOT_SUPPORTED
    driver.cuMemGetAllocationGranularity = lambda *arguments: (answer, 0)
    with pytest.raises(
        MoEPrefetchError, match=r"NOT_SUPPORTED.*A40-48C.*--moe-gpu-prefetch"
    ):
        device_memory(driver)
    answer = driver.error.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(DriverError, match="Granularity: CUDA_ERROR_INVALID_VALUE"):
        device_memory(driver)


def test_wsl():
    memory = device_memory(FakeDriver(wsl=True))
    rows_of(memory, "w", 8, 6, 1 << 16)
    assert memory.committed


def test_a_context_must_be_current():
    driver = FakeDriver()
    driver.context = 0
    with pytest.raises(MoEPrefetchError, match=r"torch.cuda.set_device\(0\)"):
        device_memory(driver)
    with pytest.raises(MoEPrefetchError, match=r"torch.cuda.set_device\(1\)"):
        DeviceMemory(Driver(FakeDriver(devices=2)), 1, lambda: False, lambda: None)


def test_out_of_memory_leaves_nothing_behind():
    driver = FakeDriver(memory=3 << 20)
    memory = device_memory(driver)
    kept = [rows_of(memory, "w", 4, 3, 1 << 19)]
    with pytest.raises(
        MoEPrefetchError, match=r"no 524,288 bytes left.*OUT_OF_MEMORY.*fewer"
    ):
        while True:
            kept.append(rows_of(memory, "w", 4, 3, 1 << 19))
    assert driver.used == memory.committed and len(driver.reservations) == len(kept)
    handles = len(driver.handles)
    with pytest.raises(MoEPrefetchError, match="OUT_OF_MEMORY"):
        rows_of(memory, "other", 40, 39, 1 << 19)
    assert driver.used == memory.committed and len(driver.handles) == handles


def test_memory_that_others_cache_is_reclaimed_once():
    driver, calls = FakeDriver(memory=3 << 20), []

    def reclaim():
        calls.append(driver.total)
        driver.total = 8 << 20

    memory = device_memory(driver, reclaim)
    rows_of(memory, "w", 4, 3, 1 << 20)
    assert calls == [3 << 20]
    with pytest.raises(DriverError) as refused:
        rows_of(memory, "w", 40, 3, 1 << 20)
    assert refused.value.call == "cuMemCreate" and len(calls) == 2
    failing = driver.error.CUDA_ERROR_UNKNOWN
    driver.cuMemCreate = lambda *arguments: (failing, 0)
    with pytest.raises(DriverError, match="CUDA_ERROR_UNKNOWN"):
        rows_of(memory, "w2", 4, 3, 1 << 20)
    assert len(calls) == 2


@pytest.mark.parametrize(
    "step", ["cuMemMap", "cuMemSetAccess", "cuMemCreate", "cuMemAddressReserve"]
)
@pytest.mark.parametrize("nth", [1, 2, 5])
def test_failure_at_any_step_leaves_nothing_behind(step, nth):
    driver = FakeDriver()
    memory = device_memory(driver)
    first = rows_of(memory, "w", 8, 6, 1 << 16)

    def state():
        lists = driver.reservations, driver.mappings, driver.handles
        return driver.used, memory.committed, *map(len, lists)

    before = state()
    real, calls = getattr(driver, step), []

    def failing(*arguments):
        calls.append(step)
        if len(calls) == nth:
            return (driver.error.CUDA_ERROR_INVALID_VALUE, 0)
        return real(*arguments)

    setattr(driver, step, failing)
    try:
        tensor = rows_of(memory, "w", 24, 20, 1 << 16)
    except DriverError as error:
        assert error.call == step and state() == before
    else:
        assert len(calls) < nth
        del tensor
    assert driver.used == memory.committed
    setattr(driver, step, real)
    rows_of(memory, "w", 24, 20, 1 << 16).fill_(3)
    assert first[0, 0] == 3


def test_failure_of_the_host_leaves_nothing_behind(monkeypatch):
    real, mapped = elastic.map_memory, []
    memory = HostMemory()

    def failing(size, *arguments, **options):
        if options:
            raise MoEPrefetchError("no more mappings")
        mapped.append((real(size, *arguments), size))
        return mapped[-1][0]

    files = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(elastic, "map_memory", failing)
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
        HostMemory().rows("w", 8, 0, 1 << 58)


def test_memory_files_cannot_be_run_where_the_kernel_knows_how(monkeypatch):
    """vm.memfd_noexec=2 refuses others; a kernel before 6.3 does not know the flag."""
    real, flags = os.memfd_create, []

    def old(name, given):
        flags.append(given)
        if given & 8:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(name, given)

    monkeypatch.setattr(os, "memfd_create", old)
    os.close(elastic._memory_file())
    assert flags == [os.MFD_CLOEXEC | 8, os.MFD_CLOEXEC]

    def none_left(name, given):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "memfd_create", none_left)
    with pytest.raises(OSError, match="Too many"):
        elastic._memory_file()


def test_freed_only_after_the_kernels_that_use_it():
    driver = FakeDriver()
    memory = device_memory(driver)
    tensor = rows_of(memory, "w", 8, 6, 1 << 16)
    driver.running = True
    del tensor
    gc.collect()
    assert not driver.mappings and not driver.running


@pytest.mark.parametrize("same", [True, False])
def test_garbage_of_an_old_engine_does_not_spoil_a_capture(same):
    """Not even when its memory went too; the next engine's frees it."""
    driver = FakeDriver()
    memory = device_memory(driver)
    tensor = rows_of(memory, "w", 8, 6, 1 << 16)
    driver.capturing = True
    del tensor
    if not same:
        memory = None
    gc.collect()
    assert driver.mappings and driver.handles and not driver.spoilt
    driver.capturing = False
    memory = memory or device_memory(driver)
    tensor = rows_of(memory, "w", 8, 6, 1 << 16)
    assert len(driver.reservations) == 1  # the new one
    memory.close()
    del tensor
    assert nothing_left(driver)


def test_a_memory_that_is_closed_during_a_capture_waits_too():
    driver = FakeDriver()
    memory = device_memory(driver)
    rows_of(memory, "w", 8, 6, 1 << 16)
    driver.capturing = True
    memory.close()
    assert driver.handles and not driver.spoilt
    driver.capturing = False
    device_memory(driver).sweep()
    assert nothing_left(driver)


def on_a_thread(action):
    thread = threading.Thread(target=action)
    thread.start()
    thread.join()


def test_collected_on_another_thread_while_this_one_captures():
    """The other thread does not see the capture, and would spoil it. This one frees
    later."""
    driver = FakeDriver()
    main = threading.current_thread()
    captures = lambda: driver.capturing and threading.current_thread() is main  # noqa: E731
    memory = DeviceMemory(Driver(driver), 0, captures, lambda: None)
    memory.torch_device = torch.device("cpu")
    tensors = [rows_of(memory, "w", 8, 6, 1 << 16)]
    driver.capturing = True
    on_a_thread(tensors.clear)
    assert driver.mappings and not driver.spoilt
    driver.capturing = False
    memory.sweep()
    assert not driver.mappings


def test_collected_without_a_context_when_the_thread_that_made_it_has_ended():
    driver, made = FakeDriver(), []
    on_a_thread(lambda: made.append(rows_of(device_memory(driver), "w", 8, 6, 1 << 16)))
    driver.context = 0  # what a new thread has
    made.clear()
    gc.collect()
    assert not driver.mappings and driver.context == 0


def test_a_failure_while_freeing_loses_nothing_else():
    """What waits stays in line, and what was not freed is not said to be."""
    failing, waiting = FakeDriver(), FakeDriver()
    memory, other = device_memory(failing), device_memory(waiting)
    tensors = [rows_of(one, "w", 8, 6, 1 << 16) for one in (memory, other)]
    failing.capturing = waiting.capturing = True
    while tensors:
        del tensors[-1]  # a sweep looks at the one that waits before the one that fails
    failing.capturing = False
    failing.cuCtxSynchronize = lambda: (failing.error.CUDA_ERROR_UNKNOWN,)
    before = memory.committed
    with pytest.raises(DriverError, match="CUDA_ERROR_UNKNOWN"):
        memory.sweep()
    assert memory.committed == before == failing.used and len(waiting.reservations) == 1
    waiting.capturing = False
    memory.sweep()
    assert not waiting.reservations


def test_every_map_is_a_whole_handle_at_offset_zero():
    driver, seen = FakeDriver(), []
    real = driver.cuMemMap

    def recording(address, size, offset, handle, flags):
        seen.append((size, offset, driver.handles[int(handle)].size))
        return real(address, size, offset, handle, flags)

    driver.cuMemMap = recording
    memory = device_memory(driver)
    layout = [(8, 6, 1 << 16), (16, 3, 70_000), (8, 6, 1 << 16), (64, 60, 9999)]
    keep = [rows_of(memory, "w", *one) for one in layout]
    assert keep and all(size == whole and offset == 0 for size, offset, whole in seen)


@pytest.mark.parametrize("copies", [False, True])
def test_torch_takes_device_memory_as_it_is(monkeypatch, copies):
    """By CUDA's protocol and with the device named: without it torch would return a
    copy."""
    memory, seen, kept = device_memory(FakeDriver()), [], []
    memory.torch_device = torch.device("cuda", 0)

    def as_tensor(holder, device):
        assert not hasattr(holder, "__array_interface__")
        seen.append((holder.__cuda_array_interface__, device))
        (size,), (address, _) = (seen[0][0][name] for name in ("shape", "data"))
        flat = torch.frombuffer(
            (ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8
        )
        kept.append(holder)  # as torch keeps it
        return flat.clone() if copies else flat

    monkeypatch.setattr(torch, "as_tensor", as_tensor)
    if copies:
        with pytest.raises(AssertionError, match="torch copied"):
            memory.tensor("w", (8, 1 << 15), torch.bfloat16, 6)
        return
    tensor = memory.tensor("w", (8, 1 << 15), torch.bfloat16, 6)
    ((interface, device),) = seen
    assert interface["shape"] == (8 << 16,) and interface["typestr"] == "|u1"
    assert interface["data"] == (tensor.data_ptr(), False) and device == torch.device(
        "cuda", 0
    )


def test_an_error_has_its_name():
    driver = Driver(FakeDriver())
    with pytest.raises(
        DriverError, match="refused cuMemCreate: CUDA_ERROR_INVALID_VALUE"
    ) as said:
        driver.call("cuMemCreate", 0, None, 0)
    assert (said.value.call, said.value.error) == (
        "cuMemCreate",
        "CUDA_ERROR_INVALID_VALUE",
    )
    driver.module.cuGetErrorName = lambda error: (
        driver.module.CUresult.CUDA_SUCCESS,
        None,
    )
    with pytest.raises(DriverError, match="error 1"):
        driver.call("cuMemCreate", 0, None, 0)


def test_a_missing_package_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(MoEPrefetchError, match="pip install 'cuda-bindings"):
        cuda_driver()


@pytest.mark.skipif(_real is None, reason="needs cuda-bindings")
def test_every_name_exists_in_nvidias_package():
    assert cuda_driver().module is _real
    text = Path(elastic.__file__).read_text() + Path(driver_module.__file__).read_text()
    names = set(re.findall(r'"(cu[A-Z]\w+)"', text)) | {"cuGetErrorName"}
    assert len(names) > 15
    for name in names:
        assert callable(getattr(_real, name)), name
    for name in set(re.findall(r"(?:cuda|module)\.(CU\w+)", text)):
        assert hasattr(_real, name), name
    for owner, name in set(re.findall(r"cuda\.(CU[a-z]\w+)\.(CU\w+)", text)):
        assert hasattr(getattr(_real, owner), name), (owner, name)
    for name in set(re.findall(r'"(CUDA_ERROR\w+)"', text)):
        assert hasattr(_real.CUresult, name), name
    for owner, values in _NAMES.items():  # what the stand-in has without the package
        for name, value in values.items():
            assert int(getattr(getattr(_real, owner), name)) == value
    for name in ("CU_MEMHOSTREGISTER_PORTABLE", "CU_MEMHOSTREGISTER_DEVICEMAP"):
        assert getattr(_real, name) == getattr(FakeDriver, name)
    properties = _real.CUmemAllocationProp()
    location = _real.CUmemLocation()
    location.type, location.id = _real.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE, 2
    properties.location = location
    assert properties.location.id == 2
    flags = properties.allocFlags
    assert flags.gpuDirectRDMACapable == 0 and flags.compressionType == 0


# ---- the rules themselves: the stand-in must refuse what the driver refuses ----


def test_the_stand_in_refuses():
    d = FakeDriver()
    bad, ok, g = d.error.CUDA_ERROR_INVALID_VALUE, d.error.CUDA_SUCCESS, d.granularity
    memory = device_memory(d)
    assert d.cuMemCreate(g + 1, memory._properties, 0)[0] == bad
    _, a = d.cuMemAddressReserve(4 * g, 0, 0, 0)
    _, h = d.cuMemCreate(2 * g, memory._properties, 0)
    assert d.cuMemMap(a + 1, 2 * g, 0, h, 0)[0] == bad
    assert d.cuMemMap(a, g, g, h, 0)[0] == bad  # offset
    assert d.cuMemMap(a, g, 0, h, 0)[0] == bad  # a part
    assert d.cuMemMap(a + 3 * g, 2 * g, 0, h, 0)[0] == bad  # beyond the reservation
    assert d.cuMemMap(a, 2 * g, 0, h, 0)[0] == ok
    assert d.cuMemMap(a + g, 2 * g, 0, h, 0)[0] == bad  # mapped already
    assert d.cuMemMap(a + 2 * g, 2 * g, 0, h, 0)[0] == ok  # the same memory twice
    assert d.cuMemSetAccess(a, 3 * g, [memory._access], 1)[0] == bad
    assert d.cuMemUnmap(a, g)[0] == bad and d.cuMemAddressFree(a, 4 * g)[0] == bad
    assert d.cuMemSetAccess(a, 4 * g, [memory._access], 1)[0] == ok
    ctypes.memset(a, 5, 1)
    assert ctypes.string_at(a + 2 * g, 1) == b"\5"
    d.cuMemRelease(h)
    assert d.used == 2 * g
    assert d.cuMemUnmap(a, 4 * g)[0] == bad  # two mappings at once
    assert d.cuMemUnmap(a, 2 * g)[0] == ok and d.cuMemUnmap(a + 2 * g, 2 * g)[0] == ok
    assert d.used == 0 and d.cuMemAddressFree(a, 4 * g)[0] == ok


def test_the_stand_in_faults_without_access(signal_of):
    d = FakeDriver()
    _, address = d.cuMemAddressReserve(d.granularity, 0, 0, 0)
    _, handle = d.cuMemCreate(d.granularity, device_memory(d)._properties, 0)
    assert d.cuMemMap(address, d.granularity, 0, handle, 0)[0] == d.error.CUDA_SUCCESS
    assert signal_of(lambda: ctypes.string_at(address, 1)) == signal.SIGSEGV


def test_host_memory_is_counted_once():
    """PSS counts a page shared by n mappings n times 1/n; RSS n times."""

    def smaps():
        text = Path("/proc/self/smaps_rollup").read_text()
        return {
            k: int(v) << 10 for k, v in re.findall(r"^(\w+):\s+(\d+) kB", text, re.M)
        }

    memory, before = HostMemory(), smaps()
    layers = [rows_of(memory, "w", 64, 48, 1 << 16) for _ in range(12)]
    for layer in layers:
        layer.fill_(1)
    after = smaps()
    grown = after["Pss"] - before["Pss"]
    assert abs(grown - memory.committed) < 2 << 20, (grown, memory.committed)
    assert after["Rss"] - before["Rss"] > 12 * (60 << 16)
