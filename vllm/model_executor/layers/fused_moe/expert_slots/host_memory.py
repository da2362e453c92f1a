# SPDX-License-Identifier: Apache-2.0
"""How much host memory this process may still take, container limits included."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

_GIB = 1 << 30
_CGROUP_ROOT = Path("/sys/fs/cgroup")
_CGROUP_FILES = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Controller directory, limit, usage and reclaimable page cache, of cgroup v2 and of v1."""


@dataclass(frozen=True)
class HostMemory:
    """Bytes of host memory: all there is for this process, and what is still to be had."""

    total: int
    available: int

    def reserve(self, gib: float | None = None) -> int:
        """Bytes that a host store must leave: `gib`, or the larger of 8 GiB and a tenth. Pinned
        memory cannot be reclaimed, and a machine without any to reclaim stands still."""
        return int(gib * _GIB) if gib is not None else max(8 * _GIB, self.total // 10)


def host_memory(root: Path = _CGROUP_ROOT, membership: str | None = None) -> HostMemory:
    """The machine's memory, or the tightest limit of the control groups that this process is in.

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


def _limits(root: Path, membership: str) -> Iterator[tuple[int, int]]:
    """Limit and used bytes of every group from this process's up to the root. Inside a container
    the named path may not exist; its own group is then mounted as the root."""
    paths = {line.split(":", 2)[1]: line.split(":", 2)[2] for line in membership.splitlines()}
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
