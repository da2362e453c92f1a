# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The device's memory keeps the driver's rules, frees only when it may, and leaves
nothing behind; and the stand-in for the driver refuses what the driver refuses."""

import ctypes
import gc
import threading

import pytest
import torch

from tests.support.fake_driver import FakeDriver, device_memory
from tests.support.rows import nothing_left, rows_of
from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.driver import (
    Driver,
    DriverError,
)
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.memory import DeviceMemory


@pytest.mark.parametrize("row", [2, 50_000])
def test_device_memory_begins_at_zero(row):
    """Rows that nothing was loaded into may be computed on: never NaN."""
    memory = device_memory(FakeDriver())
    memory.tensor("w", (8, row), torch.float32, staged=6).fill_(float("nan"))
    assert not memory.tensor("w", (8, row), torch.float32, staged=6).any()


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
