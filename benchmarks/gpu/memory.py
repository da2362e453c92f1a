# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Checks mapped memory, pinned memory, and kernels on both, in a few seconds and
without a model. A check that fails does not keep the others from running."""

import gc
from collections.abc import Callable

import torch

from benchmarks.gpu import pinning
from benchmarks.gpu.machine import EXPERTS, STAGED, Machine
from benchmarks.gpu.runs import Options
from benchmarks.results import Row
from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.driver import cuda_driver
from vllm.model_executor.layers.fused_moe.expert_slots.weights.host_pages import (
    tensor_over,
)
from vllm.model_executor.layers.fused_moe.expert_slots.weights.layout import split
from vllm.model_executor.layers.fused_moe.expert_slots.weights.memory import Memory


def memory(options: Options) -> list[Row]:
    """The checks on this machine's GPU."""
    torch.zeros(1, device="cuda")  # makes the context
    return run(Machine(cuda_driver(), torch.cuda.current_device()))


def run(machine: Machine) -> list[Row]:
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
    """more memory than is free is refused by name, and leaves nothing behind"""
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


CHECKS: tuple[Callable[[Machine], str], ...] = (
    _context,
    _granularity,
    _aliasing,
    _tensors,
    _order,
    _accounting,
    _too_much,
    *pinning.CHECKS,
)
