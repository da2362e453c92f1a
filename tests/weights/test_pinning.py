# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What is pinned has pages of its own and is unpinned before its address can come
again. A refusal names CUDA's reason."""

import gc
import mmap
import os
import signal
import sys

import pytest
import torch

from tests.support.fake_driver import FakeDriver, device_memory
from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError
from vllm.model_executor.layers.fused_moe.expert_slots.counters import (
    SlotCounters,
)
from vllm.model_executor.layers.fused_moe.expert_slots.cpu.memory import CPUMemory
from vllm.model_executor.layers.fused_moe.expert_slots.cuda import memory as cuda_memory
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.driver import DriverError
from vllm.model_executor.layers.fused_moe.expert_slots.shared_store.store import (
    shared_store,
)
from vllm.model_executor.layers.fused_moe.expert_slots.weights import host_pages
from vllm.model_executor.layers.fused_moe.expert_slots.weights.host_pages import (
    HostPages,
    host_tensor,
    pages_of,
)


@pytest.fixture
def driver():
    """Of a machine whose GPU reaches host memory by other addresses."""
    return FakeDriver(host_offset=1 << 46)


@pytest.fixture
def unmapped(monkeypatch):
    """Addresses that were unmapped; another mapping may have taken them since."""
    addresses, unmap = [], host_pages.unmap_memory

    def unmap_and_note(address, size):
        addresses.append(address)
        unmap(address, size)

    monkeypatch.setattr(host_pages, "unmap_memory", unmap_and_note)
    monkeypatch.setattr(cuda_memory, "unmap_memory", unmap_and_note)
    return addresses


# ---- pages ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int64])
def test_a_host_tensor_has_pages_of_its_own(dtype):
    """At their start; a part of it, or another tensor, has none."""
    tensor = host_tensor((3, 5, 7), dtype)
    assert (
        tensor.shape == (3, 5, 7) and tensor.dtype == dtype and tensor.is_contiguous()
    )
    assert tensor.data_ptr() % mmap.PAGESIZE == 0 and (tensor.float() == 0).all()
    pages = pages_of(tensor)
    assert (pages.address, pages.size) == (tensor.data_ptr(), 105 * dtype.itemsize)
    assert pages_of(tensor.view(torch.uint8)) is pages
    assert pages_of(tensor[1]) is None and pages_of(torch.zeros(9)) is None
    assert pages_of(torch.empty(3, device="meta")) is None


def test_pages_live_as_long_as_a_tensor_on_them(unmapped):
    tensor = host_tensor((1000, 1000), torch.uint8)
    address, part = tensor.data_ptr(), tensor[999]
    del tensor
    gc.collect()
    assert not unmapped and part.fill_(3).sum() == 3000
    del part
    gc.collect()
    assert unmapped == [address]


def test_pages_of_a_file(tmp_path):
    """What is written there is in the file."""
    path = tmp_path / "file"
    path.write_bytes(bytes(3 * mmap.PAGESIZE))
    with open(path, "r+b") as file:
        tensor = HostPages.of_file(file.fileno(), 12, mmap.PAGESIZE).tensor(
            torch.int32, (3,)
        )
    tensor.copy_(torch.tensor([1, 2, 3]))
    assert path.read_bytes()[mmap.PAGESIZE :][:12] == tensor.numpy().tobytes()


def test_what_cannot_be_mapped_is_said():
    with pytest.raises(
        MoEPrefetchError, match=r"^1,152,.* mapped: .*--moe-gpu-prefetch"
    ):
        HostPages(1 << 60)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_write_to_read_only_memory_ends_the_process(driver, signal_of, on_gpu):
    """It is registered while it can be written, as discrete cards demand, and protected
    then."""
    memory = device_memory(driver) if on_gpu else CPUMemory()
    tensor = host_tensor((70_000,), torch.uint8).fill_(4)
    memory.pin(tensor)
    assert signal_of(lambda: tensor[-1].fill_(5)) == 0
    memory.pin(tensor, read_only=True)
    assert signal_of(lambda: tensor[-1].fill_(5)) == signal.SIGSEGV
    assert tensor.sum() == 280_000


def test_on_the_cpu_a_pinned_tensor_is_itself():
    tensor = torch.zeros(3)
    assert CPUMemory().pin(tensor) == tensor.data_ptr()
    with pytest.raises(AssertionError, match="pages of its own"):
        CPUMemory().pin(tensor, read_only=True)


# ---- pinned for a GPU ----


def test_kernels_reach_it_where_the_driver_says(driver):
    """Pinning again changes nothing but the protection."""
    memory, tensor = device_memory(driver), host_tensor((5000,), torch.uint8)
    address = memory.pin(tensor)
    assert address == tensor.data_ptr() + driver.host_offset
    assert memory.pin(tensor, read_only=True) == address and len(driver.registered) == 1
    (entry,) = driver.registered.values()
    assert entry.size == 5000 and entry.flags == 1 | 2
    assert memory.committed == 0


def test_only_pages_of_its_own_are_pinned(driver):
    memory = device_memory(driver)
    for tensor in (torch.zeros(5000), host_tensor((2, 4096), torch.uint8)[1]):
        with pytest.raises(AssertionError, match="pages of its own"):
            memory.pin(tensor)
    assert not driver.registered


def test_engines_one_after_another_in_a_process(driver):
    """Layout, store, counters; freed addresses come again, and are never still
    registered."""
    seen, again = set(), 0
    for _ in range(4):
        memory = device_memory(driver)
        engine = []
        for layer in range(3):
            homes = [host_tensor((8, 1 << 16), torch.uint8) for _ in range(2)]
            counted = SlotCounters(f"layer{layer}", 0, 2, 1, 8)
            addresses = [memory.pin(t) for t in (*homes, counted.tensor)]
            again += sum(address in seen for address in addresses)
            seen.update(addresses)
            rows = [
                memory.tensor(name, (8, 1 << 16), torch.uint8, 6)
                for name in ("w13", "w2")
            ]
            for row, home in zip(rows, homes, strict=True):
                row[6:] = home[:2]
            engine.append((homes, rows, counted))
        assert len(driver.registered) == 9
        driver.running = True
        del engine, homes, rows, row, home, counted
        if _ % 2:
            memory.close()
        del memory
        gc.collect()
        assert not driver.registered and not driver.used and not driver.reservations
        assert not driver.handles
    assert again, "no address came again: this test proves nothing"


def test_memory_that_is_unmapped_while_registered_is_noticed(driver):
    """The stand-in's own rule: what the bug looked like."""
    pages = HostPages(1 << 20)
    assert driver.cuMemHostRegister(pages.address, pages.size, 3) == (0,)
    address = pages.address
    del pages
    again = HostPages.__new__(HostPages)
    again._take(address_again(address), 1 << 20)
    assert driver.cuMemHostRegister(again.address, again.size, 3) == (712,)
    with pytest.raises(
        MoEPrefetchError, match=r"ALREADY_REGISTERED.*report it, or serve without"
    ):
        device_memory(driver).pin(again.tensor(torch.uint8, (1 << 20,)))


def address_again(address):
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | host_pages.MAP_FIXED
    return host_pages.map_memory(1 << 20, flags, address=address)


def test_an_address_that_comes_again_is_pinned_again(driver):
    memory, seen = device_memory(driver), []
    for _ in range(40):
        tensor = host_tensor((5000,), torch.uint8)
        memory.pin(tensor)
        assert list(driver.registered) == [tensor.data_ptr()]
        seen.append(tensor.data_ptr())
        del tensor
        gc.collect()
    assert len(set(seen)) < 40, "no address came again: this test proves nothing"


def test_unregistered_after_the_kernels_and_before_the_unmapping(driver, unmapped):
    memory, tensor = device_memory(driver), host_tensor((5000,), torch.uint8)
    memory.pin(tensor)
    address, driver.running = tensor.data_ptr(), True
    driver.calls.clear()
    del tensor
    gc.collect()
    assert driver.calls == ["cuCtxSynchronize", "cuMemHostUnregister"]
    assert not driver.registered and unmapped == [address]


def test_collected_on_a_thread_without_a_context(driver):
    memory, tensor = device_memory(driver), host_tensor((5000,), torch.uint8)
    memory.pin(tensor)
    driver.context = 0
    del tensor
    gc.collect()
    assert not driver.registered and driver.context == 0


@pytest.mark.parametrize("same", [True, False])
def test_nothing_is_unregistered_during_a_capture(driver, same, unmapped):
    """Not even the memory of an engine that is wholly gone; and it stays mapped for so
    long."""
    memory, tensor = device_memory(driver), host_tensor((5000,), torch.uint8)
    memory.pin(tensor)
    address, driver.capturing = tensor.data_ptr(), True
    del tensor
    if not same:
        memory = None
    gc.collect()
    assert driver.registered and not unmapped and not driver.spoilt
    driver.capturing = False
    memory = memory or device_memory(driver)
    memory.sweep()
    assert not driver.registered and unmapped == [address]


def test_memory_that_could_not_be_unregistered_stays_mapped(
    driver, monkeypatch, unmapped
):
    """Its address must not come again."""
    memory, tensor = device_memory(driver), host_tensor((5000,), torch.uint8)
    memory.pin(tensor)
    driver.cuMemHostUnregister = lambda _: (driver.error.CUDA_ERROR_UNKNOWN,)
    said = []
    with monkeypatch.context() as patch:
        patch.setattr(sys, "unraisablehook", said.append)
        del tensor
        gc.collect()
    assert not unmapped and [one.exc_value.error for one in said] == [
        "CUDA_ERROR_UNKNOWN"
    ]


ADVICE = {
    "OUT_OF_MEMORY": (
        r"Raise the limit of locked memory \(ulimit -l\), free host memory"
    ),
    "OPERATING_SYSTEM": (
        r"Raise the limit of locked memory \(ulimit -l\), free host memory"
    ),
    "HOST_MEMORY_ALREADY_REGISTERED": "Another library in this process has registered",
    "NOT_SUPPORTED": "This platform cannot map host memory",
    "UNKNOWN": "Look up what this error means here",
}


@pytest.mark.parametrize("call", ["cuMemHostRegister", "cuMemHostGetDevicePointer"])
@pytest.mark.parametrize("error", ADVICE)
def test_a_refusal_names_the_error_and_the_way_out(driver, error, call):
    """And leaves nothing registered."""
    value = getattr(driver.error, f"CUDA_ERROR_{error}")
    setattr(driver, call, lambda *arguments: (value, 0))
    said = (
        rf"pin 4,000 bytes of host memory \({call}: CUDA_ERROR_{error}\). "
        rf"{ADVICE[error]}.*, or"
    )
    with pytest.raises(DriverError, match=f"{said} serve without --moe-gpu-prefetch"):
        device_memory(driver).pin(host_tensor((1000,), torch.float32))
    gc.collect()
    assert not driver.registered


def test_the_stand_in_refuses(driver):
    """What the driver refuses."""
    bad, unsupported = (
        driver.error.CUDA_ERROR_INVALID_VALUE,
        driver.error.CUDA_ERROR_NOT_SUPPORTED,
    )
    memory, tensor = (
        device_memory(driver),
        host_tensor((2 * mmap.PAGESIZE,), torch.uint8),
    )
    address, size = tensor.data_ptr(), tensor.numel()
    rows = memory.tensor("w", (8, 1 << 16), torch.uint8, 6)
    register = driver.cuMemHostRegister
    assert register(address, 0, 3) == (bad,)
    assert register(address, size, 3 | 8) == (unsupported,)
    assert register(rows.data_ptr(), 1 << 16, 3) == (bad,)
    assert register(8, 100, 3) == (bad,)
    assert driver.cuMemHostUnregister(address) == (bad,)
    assert register(address, size, 1) == (0,)
    assert (
        driver.cuMemHostGetDevicePointer(address, 0)[0] == bad
    )  # not mapped for the device
    already = driver.error.CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED
    assert register(address + mmap.PAGESIZE, 1, 3) == (already,)
    assert driver.cuMemHostUnregister(address) == (0,)
    pages_of(tensor).protect()
    assert register(address, size, 3) == (bad,)


# ---- the shared store is pinned ----


def test_a_shared_store_is_pinned_tensor_by_tensor(driver, signal_of, tmp_path):
    """By its builder and by engines that attach it. From then on none of them can
    change it."""
    tensors = {"w13": torch.randn(4, 100, 33), "w2_bias": torch.arange(28).view(4, 7)}
    for ready in (False, True):
        memory = device_memory(driver)
        with shared_store(tmp_path / "stores", {"model": "m"}) as store:
            assert store.ready is ready
            held = store.attach("a") if ready else store.add("a", tensors)
            for tensor in held.values():
                memory.pin(tensor, read_only=True)
        for name, tensor in held.items():
            assert torch.equal(tensor, tensors[name])
            assert driver.registered[tensor.data_ptr()].size == tensor.nbytes
            assert signal_of(tensor.zero_) == signal.SIGSEGV
        assert not any("experts.bin" in link(fd) for fd in os.listdir("/proc/self/fd"))
        del held, tensor
        gc.collect()
        assert not driver.registered


def link(descriptor):
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except FileNotFoundError:
        return ""
