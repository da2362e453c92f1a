# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Checks that kernels reach pinned host memory, and that it is let go in time."""

import gc
import mmap
import os
import tempfile
from pathlib import Path

import torch

from benchmarks.gpu.machine import EXPERTS, STAGED, Machine
from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchConfig
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.driver import DriverError
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.gather_kernel import Gather
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.manager import (
    CudaSlotManager,
)
from vllm.model_executor.layers.fused_moe.expert_slots.weights.host_pages import (
    HostPages,
    host_tensor,
)
from vllm.model_executor.layers.fused_moe.expert_slots.weights.memory import Memory
from vllm.model_executor.layers.fused_moe.expert_slots.weights.rows import ExpertRows
from vllm.model_executor.layers.fused_moe.expert_slots.weights.store import ExpertStore


def _store(page: int) -> ExpertStore:
    """Random experts on pages of their own: a tensor of rows so wide that two pages of
    staging are shared, and a tensor of rows of 40 bytes."""
    homes = {}
    for name, width in {"w13_weight": page // 2 + 16, "w13_scale": 40}.items():
        random = torch.randint(0, 256, (EXPERTS, width), dtype=torch.uint8)
        homes[name] = host_tensor(random.shape, torch.uint8).copy_(random)
    return ExpertStore(homes)


def _load_all(memory: Memory, store: ExpertStore, read_only: bool = False) -> int:
    """Loads all experts by the kernel, in another order, and compares. Returns the
    distance of the addresses by which the kernel reads from the host's."""
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
    """engines that follow each other pin and unpin memory at the same addresses"""
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
        rows = ExpertRows(store, EXPERTS - STAGED, memory)
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


CHECKS = (_pinning, _engines, _shared_file, _counters)
