# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Running totals of what a layer's slots did, which other processes can read.

Each layer and rank has one small file of int64 totals, in a directory that the
front-end process names in the environment. The worker maps the file. So counting costs
an addition, and a reader sees the current totals without asking the engine.
"""

import atexit
import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.logger import init_logger

from vllm.model_executor.layers.fused_moe.expert_slots.weights.host_pages import (
    HostPages,
)

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.expert_slots.decisions.step import (
        StepPlan,
    )

logger = init_logger(__name__)

DIRECTORY_VARIABLE = "MOE_GPU_PREFETCH_COUNTERS"
_COPIED_BY_RAY = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"
"""The variable in which vLLM lists, separated by commas, further variables to copy to
Ray's processes."""

TOTALS = {
    "steps": "Steps of the layer that needed an expert",
    "needed": "Distinct experts that steps needed",
    "hits": "Needed experts that were resident",
    "misses": "Needed experts that were not resident",
    "loads": "Experts loaded host-to-device",
    "staged": "Loads into a staging row: used by one step and forgotten",
    "evictions": "Loads into a slot, each in the place of another expert",
    "staged_steps": "Steps that loaded into staging rows",
    "overflow_steps": "Steps that needed more experts than there are slots",
    "bytes_loaded": "Bytes loaded host-to-device",
}
"""The totals, with their meaning, in the order of a file. Nothing else states the
order: kernels and readers find a total by its name."""

SIZES = {
    "slots": "Expert slots of the layer",
    "experts": "Experts of the layer on a rank",
    "slot_bytes": "Bytes of the layer's slots",
    "store_bytes": "Bytes of the layer's host store",
}
"""Constants of the layer, behind the totals in its file."""

OF_EVERY_RANK = frozenset({"bytes_loaded", "slot_bytes", "store_bytes"})
"""Of the totals and sizes, what a replica adds to: its bytes are its own shard of each
expert, loaded over its own link. All else it counts is what its group's first rank
counts too."""

_FIELDS = [*TOTALS, *SIZES]
_LINK, _REPLICA = len(_FIELDS), len(_FIELDS) + 1
_NUM_VALUES = len(_FIELDS) + 2
_NUM_BYTES = _NUM_VALUES * 8

_PREFIX, _LOCK = "vllm-expert-slots-", "lock"


def open_counters_directory() -> Path:
    """Makes the directory of one engine's counter files and names it in the
    environment, which the engine's processes inherit.

    It is removed when this process ends. If this process is killed, the next one
    removes it.
    """
    # Shared memory if there is any: a GPU can map only files without a disk behind
    # them.
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()
    _remove_abandoned(Path(place))
    directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
    _hold(directory)
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    os.environ[DIRECTORY_VARIABLE] = str(directory)
    return directory


def give_directory_to_ray() -> None:
    """Makes vLLM copy the directory's variable to the processes that Ray starts. vLLM
    copies variables with its own prefixes, and those that its list names."""
    names = [
        name for name in os.environ.get(_COPIED_BY_RAY, "").split(",") if name.strip()
    ]
    if DIRECTORY_VARIABLE not in names:
        os.environ[_COPIED_BY_RAY] = ",".join([*names, DIRECTORY_VARIABLE])


def _hold(directory: Path) -> None:
    """Locks `directory` until this process and all that it forked have ended."""
    # The descriptor stays open, so the lock lasts as long as this process. The file
    # gets its name once the lock is held; before, another start would take the
    # directory for an abandoned one.
    unlocked = directory / "unlocked"
    fcntl.flock(os.open(unlocked, os.O_RDWR | os.O_CREAT, 0o600), fcntl.LOCK_EX)
    unlocked.rename(directory / _LOCK)


def _remove_abandoned(place: Path) -> None:
    for path in place.glob(f"{_PREFIX}*/{_LOCK}"):
        with suppress(OSError):
            lock = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path.parent)
            finally:
                os.close(lock)


class SlotCounters:
    """Totals of one layer and rank since loading.

    `hits + misses == needed`. Every miss is one load, into a staging row or into a slot
    in the place of another expert, because no slot is ever empty.

    Args:
        layer_name: names the file, with `rank`.
        rank: of this worker.
        slots: N.
        bytes_per_expert: on this rank.
        experts: E.
        replica: whether another rank counts the same steps, as in tensor parallelism.

    Attributes:
        tensor: the totals, [len(TOTALS)] int64 in host memory, in the order of
            `TOTALS`. It lies at the start of pages of its own, so a memory can pin it
            and kernels count where readers look.
    """

    def __init__(
        self,
        layer_name: str,
        rank: int,
        slots: int,
        bytes_per_expert: int,
        experts: int,
        replica: bool = False,
    ):
        self._slots, self._bytes_per_expert = slots, bytes_per_expert
        directory = os.environ.get(DIRECTORY_VARIABLE)
        if directory and Path(directory).is_dir():
            pages = _new_file(Path(directory) / f"{rank}@{layer_name}")
        else:
            # Ray may have started this process on another host, without the directory.
            if directory:
                logger.warning_once(
                    "The expert-slot counters of rank %d are not on /metrics: the "
                    "directory %s is not on this host. "
                    "collective_rpc('expert_slot_counters') answers for all ranks.",
                    rank,
                    directory,
                )
            pages = HostPages(_NUM_BYTES)
        values = pages.tensor(torch.int64, (_NUM_VALUES,))
        self.tensor = values[: len(TOTALS)]
        self._values = values.numpy()
        self._totals = self.tensor.numpy()
        names = list(TOTALS)
        self._of_hits = [names.index(name) for name in ("steps", "needed", "hits")]
        sizes = {
            "slots": slots,
            "experts": experts,
            "slot_bytes": slots * bytes_per_expert,
            "store_bytes": experts * bytes_per_expert,
        }
        self._values[len(TOTALS) : _LINK] = [sizes[name] for name in SIZES]
        self._values[_LINK], self._values[_REPLICA] = 0, replica

    def add(self, plan: "StepPlan") -> None:
        """Counts one step."""
        misses, staged = plan.misses, plan.staged
        amounts = {
            "steps": plan.needed > 0,
            "needed": plan.needed,
            "hits": plan.hits,
            "misses": misses,
            "loads": misses,
            "staged": staged,
            "evictions": misses - staged,
            "staged_steps": staged > 0,
            "overflow_steps": plan.needed > self._slots,
            "bytes_loaded": misses * self._bytes_per_expert,
        }
        self._totals += [amounts[name] for name in TOTALS]

    def add_hits(self, needed: int) -> None:
        """Counts one step that missed nothing.

        Args:
            needed: distinct experts that it needed.
        """
        # All at once: another thread sees the totals before the step or after it.
        self._totals[self._of_hits] += (1, needed, needed)

    def set_link(self, bandwidth: float) -> None:
        """Notes what this rank's link carries.

        Args:
            bandwidth: bytes a second, host-to-device, as measured.
        """
        self._values[_LINK] = round(bandwidth)

    @property
    def link(self) -> int | None:
        """What `set_link` noted."""
        return int(self._values[_LINK]) or None

    def clear(self) -> None:
        """Sets the totals to zero."""
        self._totals.fill(0)

    def __getattr__(self, name: str) -> int:
        try:
            return int(self.__dict__["_values"][_FIELDS.index(name)])
        except (KeyError, ValueError):
            raise AttributeError(name) from None

    def as_dict(self) -> dict[str, int]:
        """Totals and sizes by name."""
        return dict(zip(_FIELDS, self._values[:_LINK].tolist(), strict=True))


def _new_file(path: Path) -> HostPages:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.ftruncate(descriptor, _NUM_BYTES)
        return HostPages.of_file(descriptor, _NUM_BYTES, 0)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class LayerReading:
    """One layer's totals and sizes as another process sees them.

    Attributes:
        values: totals and sizes by name.
        link: bytes a second, host-to-device, of the rank's link; None if it was not
            measured.
        replica: whether another rank counts the same steps.
    """

    rank: int
    layer: str
    values: dict[str, int]
    link: int | None
    replica: bool


def read_counters(directory: Path) -> list[LayerReading]:
    """Reads every layer's file in `directory`. Skips files with another length or
    name, and is empty if there is no such directory."""
    readings = []
    for path in sorted(directory.iterdir()) if directory.is_dir() else []:
        rank, at, layer = path.name.partition("@")
        try:
            values = np.fromfile(path, dtype=np.int64).tolist()
        except OSError:  # an engine that ends removes its files
            continue
        if at and rank.isdecimal() and len(values) == _NUM_VALUES:
            totals = dict(zip(_FIELDS, values[:_LINK], strict=True))
            link, replica = values[_LINK] or None, bool(values[_REPLICA])
            readings.append(LayerReading(int(rank), layer, totals, link, replica))
    return readings
