# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Whether a GPU really holds what was loaded: compares its free memory before and after
loading."""

from dataclasses import dataclass

from vllm.model_executor.layers.fused_moe.expert_slots.sizes import gib

_ALLOWANCE = 512 << 20
"""Bytes that loading may take without being counted, beside a twentieth of what was
loaded: code of kernels and workspaces of libraries, which the driver loads when they
are first used."""


@dataclass(frozen=True)
class DeviceUse:
    """Bytes of one GPU at one moment.

    Attributes:
        total: as the driver reports it (`cudaMemGetInfo`).
        free: held by no process.
        held: allocated by this process for tensors, cached memory included.
    """

    total: int
    free: int
    held: int


def shortfall(before: DeviceUse, after: DeviceUse) -> str | None:
    """Says what is wrong with a GPU's memory after loading; None if nothing is.

    Either less is free than loading explains, or the GPU cannot hold all that was
    allocated. The second happens on Windows and WSL2, where the driver may move memory
    to the host without an error. Then held and free memory together exceed the GPU's
    total, or more was allocated than was free and next to nothing is left. This has not
    been seen on such a driver yet.
    """
    taken = after.held - before.held
    expected = before.free - taken
    tolerance = _ALLOWANCE + max(0, taken) // 20
    beyond = after.held + after.free - after.total
    if after.free < tolerance:
        beyond = max(beyond, -expected)
    if beyond > tolerance:
        return (
            f"This process holds {gib(after.held)} of GPU memory and "
            f"{gib(after.free)} are free, of {gib(after.total)} in all; "
            f"{gib(before.free)} were free before {gib(taken)} were loaded. The "
            "driver keeps a part in host memory, which makes every step many times "
            "slower. Lower --moe-gpu-prefetch or --gpu-memory-utilization; on "
            "Windows and WSL2 set the NVIDIA Control Panel's CUDA - Sysmem Fallback "
            "Policy to Prefer No Sysmem Fallback."
        )
    if expected - after.free > tolerance:
        return (
            f"{gib(after.free)} of GPU memory are free after loading, {gib(expected)} "
            f"were expected ({gib(before.free)} free before, {gib(taken)} loaded): "
            f"{gib(expected - after.free)} are missing, and the KV cache will be "
            "smaller than planned. Look for another process on this GPU "
            "(nvidia-smi), or lower --moe-gpu-prefetch."
        )
    return None
