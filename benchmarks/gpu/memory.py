# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What `gpu_check.py memory` checks: mapped memory, pinned memory, and kernels on both.
It takes no model and a few seconds. A check that fails does not keep the others from
running."""

import gc
import mmap
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vllm.model_executor.layers.fused_moe.expert_slots.config import (
    MoEPrefetchConfig,
    MoEPrefetchError,
)
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.backend import CudaBackend
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.gather_kernel import Gather
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.manager import (
    CudaSlotManager,
)
from vllm.model_executor.layers.fused_moe.expert_slots.weights.driver import (
    Driver,
    DriverError,
)
from vllm.model_executor.layers.fused_moe.expert_slots.weights.elastic import (
    Memory,
    split,
)
from vllm.model_executor.layers.fused_moe.expert_slots.weights.host_pages import (
    HostPages,
    host_tensor,
    tensor_over,
)
from vllm.model_executor.layers.fused_moe.expert_slots.weights.rows import ExpertRows
from vllm.model_executor.layers.fused_moe.expert_slots.weights.store import ExpertStore

EXPERTS, STAGED = 8, 5


class Machine:
    """The GPU that is checked. A test puts a stand-in here."""

    def __init__(self, driver: Driver, device: int = 0):
        self.driver, self.device = driver, device

    def memory(self) -> Memory:
        return CudaBackend().memory(torch.device("cuda", self.device))

    def synchronise(self) -> None:
        torch.cuda.synchronize(self.device)

    def twice(self, work: Callable[[], None]) -> None:
        """Does `work` as it is, and once more as a captured graph."""
        work()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        graph.replay()

    def free(self) -> int:
        gc.collect()
        return self.driver.call("cuMemGetInfo")[0]


def run(machine: Machine) -> list[dict[str, Any]]:
    """One row a check: what it is, "ok" or the error's text, and what it saw."""
    rows = []
    for check in CHECKS:
        row = {"check": (check.__doc__ or "").strip(), "result": "ok"}
        try:
            row["seen"] = check(machine)
        except Exception as error:  # whatever it is, it is the result
            row["result"] = f"{type(error).__name__}: {error}".strip()
        gc.collect()
        rows.append(row)
    return rows


def _context(machine: Machine) -> str:
    """the driver is there and has a context on this thread"""
    assert int(machine.driver.call("cuCtxGetCurrent")), "no context is current"
    device = int(machine.driver.call("cuCtxGetDevice"))
    assert device == machine.device, f"the context is that of device {device}"
    return f"{machine.free() >> 20} MiB free"


def _granularity(machine: Machine) -> str:
    """the device can map memory"""
    page = machine.memory().page
    assert page & (page - 1) == 0, f"granularity {page}"
    return f"granularity {page >> 10} KiB"


def _layers(memory: Memory, pages: int = 1) -> list[dict[str, torch.Tensor]]:
    """Two layers of two roles. The staged rows of each end within a page."""
    widths = {
        "w13": pages * memory.page + memory.page // 2,
        "w2": pages * memory.page + 512,
    }
    return [
        {
            role: memory.tensor(role, (EXPERTS, width // 2), torch.bfloat16, STAGED)
            for role, width in widths.items()
        }
        for _ in range(2)
    ]


def _aliasing(machine: Machine) -> str:
    """staging is one memory for two layers; slots and the page between are not"""
    memory = machine.memory()
    layers = _layers(memory)
    for number, layer in enumerate(layers, 1):
        for place, tensor in enumerate(layer.values()):
            tensor.fill_(number + 10 * place)
    machine.synchronise()
    for number, layer in enumerate(layers, 1):
        for place, (role, tensor) in enumerate(layer.items()):
            shared = split(EXPERTS, STAGED, tensor[0].nbytes, memory.page)[0] // 2
            flat = tensor.flatten()
            assert 0 < shared < STAGED * tensor.shape[1], (
                "the page between is not tried"
            )
            assert (flat[:shared] == 2 + 10 * place).all(), (
                f"{role}: staging is not shared"
            )
            assert (flat[shared:] == number + 10 * place).all(), (
                f"{role}: slots are shared"
            )
    # And the other way round.
    layers[0]["w13"][0].fill_(77)
    machine.synchronise()
    assert (layers[1]["w13"][0] == 77).all(), (
        "what layer 0 wrote is not seen through layer 1"
    )
    return f"{len(layers)} layers of {len(layers[0])} roles"


def _tensors(machine: Machine) -> str:
    """torch computes on mapped memory itself, not on a copy"""
    memory = machine.memory()
    width = memory.page // 2 + 256
    rows = memory.rows("w", EXPERTS, STAGED, 2 * width)
    tensor = tensor_over(rows, torch.bfloat16, (EXPERTS, width), memory.torch_device)
    assert tensor.data_ptr() == rows.address and tensor.device == memory.torch_device
    values = torch.arange(EXPERTS * width, device=tensor.device).remainder_(13)
    tensor.copy_(values.view_as(tensor))
    x = torch.ones(16, width, dtype=tensor.dtype, device=tensor.device)
    assert torch.equal(x @ tensor.T, x @ tensor.clone().T), (
        "a product differs from a copy's"
    )
    return f"at {rows.address:#x}"


def _order(machine: Machine) -> str:
    """each layer reads the staging that it wrote, in stream order and in a graph"""
    memory = machine.memory()
    layers = _layers(memory)
    seen = torch.zeros(8, dtype=torch.float64, device=memory.torch_device)

    def steps() -> None:
        for step in range(len(seen)):
            rows = layers[step % 2]["w13"][:STAGED]
            rows.fill_(step + 1)
            seen[step] += rows.amax() + rows.amin()

    machine.twice(steps)
    machine.synchronise()
    assert seen.tolist() == [4 * (step + 1) for step in range(len(seen))], seen.tolist()
    return f"{len(seen)} layers, twice"


def _accounting(machine: Machine) -> str:
    """free memory falls by what was committed, and comes back"""
    before = machine.free()
    memory = machine.memory()
    layers = _layers(memory, pages=8)
    committed, used = memory.committed, before - machine.free()
    unshared = sum(tensor.nbytes for layer in layers for tensor in layer.values())
    del layers, memory
    left = before - machine.free()
    tolerance = 8 * machine.memory().page
    assert committed < 0.8 * unshared, (
        f"{committed:,} of {unshared:,} bytes: nothing is shared"
    )
    assert abs(used - committed) <= tolerance, (
        f"{used:,} bytes used, {committed:,} committed"
    )
    assert left <= tolerance, f"{left:,} bytes did not come back"
    return (
        f"{committed >> 10} KiB committed, {used >> 10} KiB used, {left >> 10} KiB "
        f"left over"
    )


def _too_much(machine: Machine) -> str:
    """more than there is is refused by name, and nothing is left of it"""
    before = machine.free()
    memory = machine.memory()
    count = 2 * before // memory.page
    try:
        memory.rows("w", count, 1, memory.page)
    except MoEPrefetchError as error:
        text = str(error)
    else:
        raise AssertionError(f"{count * memory.page:,} bytes were given")
    del memory
    left = before - machine.free()
    assert left <= 8 * machine.memory().page, f"{left:,} bytes are left"
    return text


def _store(page: int) -> ExpertStore:
    """Random experts on pages of their own: one tensor of wide rows, large enough that
    two pages of staging are shared, and one of rows of 40 bytes."""
    homes = {}
    for name, width in {"w13_weight": page // 2 + 16, "w13_scale": 40}.items():
        random = torch.randint(0, 256, (EXPERTS, width), dtype=torch.uint8)
        homes[name] = host_tensor(random.shape, torch.uint8).copy_(random)
    return ExpertStore(homes)


def _load_all(memory: Memory, store: ExpertStore, read_only: bool = False) -> int:
    """Loads all experts by the kernel, in another order, and compares; how far the
    addresses by which it reads are from the host's."""
    where = memory.torch_device
    homes = [memory.pin(home, read_only) for home in store.tensors.values()]
    rows = [
        memory.tensor(name, home.shape, home.dtype, STAGED).fill_(0)
        for name, home in store.tensors.items()
    ]
    order = torch.arange(EXPERTS, dtype=torch.int32).roll(3)
    count = torch.tensor([EXPERTS], dtype=torch.int32, device=where)
    places = torch.arange(EXPERTS, dtype=torch.int32, device=where)
    Gather(homes, rows).launch(count, order.to(where), places)
    for (name, home), here in zip(store.tensors.items(), rows, strict=True):
        assert torch.equal(here.cpu(), home[order.long()]), (
            f"{name} is not what the host wrote"
        )
    return homes[0] - next(iter(store.tensors.values())).data_ptr()


def _pinning(machine: Machine) -> str:
    """the load kernel reads pinned host memory, and what is written there later"""
    memory = machine.memory()
    store = _store(memory.page)
    _load_all(memory, store)
    for home in store.tensors.values():
        home.bitwise_not_()
    away = _load_all(memory, store)
    return (
        f"at {away:+#x} from the host's addresses"
        if away
        else "at the host's addresses"
    )


def _engines(machine: Machine) -> str:
    """several engines one after another pin and unpin, at addresses that come again"""
    addresses = []
    for _ in range(5):
        memory = machine.memory()
        store = _store(memory.page)
        _load_all(memory, store)
        addresses.append(store.tensors["w13_weight"].data_ptr())
        del memory, store
        gc.collect()
        try:
            machine.driver.call("cuMemHostGetDevicePointer", addresses[-1], 0)
        except DriverError:
            continue
        raise AssertionError(f"{addresses[-1]:#x} is still registered")
    return f"{len(addresses)} engines at {len(set(addresses))} addresses"


def _shared_file(machine: Machine) -> str:
    """a file in shared memory is pinned, then protected, by two mappings and two
    engines"""
    page = machine.memory().page
    home = _store(page).tensors["w13_weight"]
    size = -(-home.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        os.ftruncate(file.fileno(), size)
        HostPages.of_file(file.fileno(), size, 0).tensor(torch.uint8, (size,))[
            : home.nbytes
        ].copy_(home.flatten())
        for _ in range(2):
            memory = machine.memory()
            for _ in range(2):
                pages = HostPages.of_file(file.fileno(), size, 0)
                tensor = pages.tensor(torch.uint8, (size,))[: home.nbytes].view_as(home)
                assert torch.equal(tensor, home)
                _load_all(memory, ExpertStore({"w13_weight": tensor}), read_only=True)
                maps = Path("/proc/self/maps").read_text().splitlines()
                (line,) = (m for m in maps if m.startswith(f"{pages.address:x}-"))
                assert line.split()[1] == "r--s", f"it is not protected: {line}"
    return f"{size >> 10} KiB"


def _counters(machine: Machine) -> str:
    """kernels count where the host reads, and load what the decisions say"""
    memory = machine.memory()
    store = _store(memory.page)
    managers = []
    for number in range(2):
        parameters = {
            name: torch.nn.Parameter(home, requires_grad=False)
            for name, home in store.tensors.items()
        }
        rows = ExpertRows(parameters, store, EXPERTS - STAGED, memory)
        managers.append(
            CudaSlotManager(MoEPrefetchConfig(slots=3), rows, f"layer {number}")
        )
    for ids in ([[0, 1]], [[7, 0]], [[6, 5], [4, 3]]):
        for manager in managers:
            asked = torch.tensor(ids, dtype=torch.int32, device=memory.torch_device)
            found = manager.step(asked).long().flatten()
            for name, home in store.tensors.items():
                here = manager.rows.tensors[name][found].cpu()
                assert torch.equal(here, home[torch.tensor(ids).flatten()]), (
                    f"{name}: {ids}"
                )
    machine.synchronise()
    for manager in managers:
        counted = manager.counters.as_dict()
        expected = {
            "steps": 3,
            "needed": 8,
            "hits": 3,
            "loads": 5,
            "staged": 1,
            "evictions": 4,
        }
        assert expected.items() <= counted.items(), f"the host reads {counted}"
        manager.residency()
    return f"{counted['loads']} loads a layer, {counted['staged']} of them staged"


CHECKS: tuple[Callable[[Machine], str], ...] = (
    _context,
    _granularity,
    _aliasing,
    _tensors,
    _order,
    _accounting,
    _too_much,
    _pinning,
    _engines,
    _shared_file,
    _counters,
)
