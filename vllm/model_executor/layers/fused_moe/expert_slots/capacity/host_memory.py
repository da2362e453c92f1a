# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""How much host memory this process can still take, container limits included, and
whether it can be pinned."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from vllm.logger import init_logger
from vllm.utils.platform_utils import is_pin_memory_available

from vllm.model_executor.layers.fused_moe.expert_slots.sizes import GIB

logger = init_logger(__name__)

_POLL_S, _PATIENCE_S = 0.5, 10.0
_QUIET_POLLS = 3
"""Polls in a row without growth that end the waiting. A process that ends unpins its
memory before it frees it, so one poll without growth says nothing."""

_GROWTH = 64 << 20
"""Bytes by which available memory grows between two polls while a large process ends.
Smaller changes come from other processes."""

_CGROUP_ROOT = Path("/sys/fs/cgroup")
_CGROUP_FILES = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Controller directory, limit, usage and reclaimable page cache, of cgroup v2 and of
v1."""


@dataclass(frozen=True)
class HostMemory:
    """Bytes of host memory: what this process may use in all, and what is available
    now."""

    total: int
    available: int

    def reserve(self, gib: float | None = None) -> int:
        """Bytes that a host store must leave available: `gib` GiB, or the larger of 8
        GiB and a tenth of the total. Pinned memory cannot be reclaimed, and a machine
        with nothing to reclaim hangs."""
        return int(gib * GIB) if gib is not None else max(8 * GIB, self.total // 10)


def host_memory(root: Path = _CGROUP_ROOT, membership: str | None = None) -> HostMemory:
    """The machine's memory, or the tightest limit of the control groups that this
    process is in.

    Args:
        root: where control groups are mounted.
        membership: the text of `/proc/self/cgroup`.
    """
    machine = psutil.virtual_memory()
    total, available = machine.total, machine.available
    if membership is None:
        own = Path("/proc/self/cgroup")
        membership = own.read_text() if own.exists() else ""
    for limit, used in _limits(root, membership):
        total = min(total, limit)
        available = min(available, max(0, limit - used))
    return HostMemory(total, available)


def available_after_waiting(
    needed: int,
    read: Callable[[], HostMemory] = host_memory,
    patience_s: float = _PATIENCE_S,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], object] = time.sleep,
) -> HostMemory:
    """Host memory, read again while less than `needed` bytes are available and the
    number grows. A server with much pinned memory frees it for seconds after it has
    ended.

    Returns after about `_QUIET_POLLS * _POLL_S` seconds without growth, and after
    `patience_s` in any case.
    """
    memory, end, quiet, said = read(), clock() + patience_s, 0, False
    while memory.available < needed and quiet < _QUIET_POLLS and clock() < end:
        sleep(_POLL_S)
        before, memory = memory, read()
        if memory.available - before.available < _GROWTH:
            quiet += 1
            continue
        quiet = 0
        if not said and memory.available < needed:
            said = True
            logger.info(
                "Waiting up to %.0f seconds for host memory: %.1f GiB must be "
                "available, the reserve included, and %.1f GiB are. Another process "
                "is freeing memory.",
                patience_s,
                needed / GIB,
                memory.available / GIB,
            )
    return memory


def pinning_objection() -> str | None:
    """Why host memory must not be pinned for a GPU here, or None. vLLM decides: under
    WSL2 it pins memory only if a variable says so, because Windows can hang when much
    memory is pinned."""
    if is_pin_memory_available():
        return None
    return (
        "expert slots keep the experts in pinned host memory, and vLLM does not pin "
        "memory under WSL2 by default: Windows lets all processes together pin about "
        "half of the machine's memory, and can hang when that is used up. Set "
        "VLLM_WSL2_ENABLE_PIN_MEMORY=1 (it needs a WSL2 kernel of 4.19.121 or later: "
        "wsl --update), or serve without --moe-gpu-prefetch."
    )


def _limits(root: Path, membership: str) -> Iterator[tuple[int, int]]:
    """Limit and used bytes of every control group from this process's own up to the
    root. Inside a container the named path may not exist; the container's group is
    mounted as the root then."""
    paths = {
        line.split(":", 2)[1]: line.split(":", 2)[2] for line in membership.splitlines()
    }
    for controller, limit_file, usage_file, reclaimable in _CGROUP_FILES:
        path = paths.get(controller, "/").strip("/")
        parts = path.split("/") if path else []
        for depth in range(len(parts), -1, -1):
            group = root.joinpath(controller, *parts[:depth])
            try:
                limit = (group / limit_file).read_text().strip()
                usage = int((group / usage_file).read_text())
                stat = (group / "memory.stat").read_text().split()
            except (OSError, ValueError):
                continue
            if limit != "max":
                cache = dict(zip(stat[::2], map(int, stat[1::2]), strict=True))
                yield int(limit), usage - cache.get(reclaimable, 0)
