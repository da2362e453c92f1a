# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Writes the steps of a worker's layers to a trace file."""

import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from vllm.logger import init_logger

from vllm.model_executor.layers.fused_moe.expert_slots.backend import SlotManager
from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError
from vllm.model_executor.layers.fused_moe.expert_slots.counters import TOTALS
from vllm.model_executor.layers.fused_moe.expert_slots.shared_store.trust import (
    create_own,
)
from vllm.model_executor.layers.fused_moe.expert_slots.trace import format
from vllm.model_executor.layers.fused_moe.expert_slots.trace.ring import (
    HEAD,
    RECORDS,
    TraceRing,
)

logger = init_logger(__name__)

POLL_S = 0.05
"""Seconds between two looks at the counters. A ring holds what a GPU decides in
seconds."""

FLUSH_S = 5.0
"""Seconds of steps, at most, that a killed worker has not written."""

_IDLE_POLLS = 4
"""Looks without a new step after which what was read is written."""

_PATIENCE_S = 10.0
"""Seconds that the worker's end waits for a write that has begun."""

_LAST_FRAME = 128
"""Bytes that are kept for the last frame."""


def trace_path(file: str, rank: int) -> Path:
    """The file of a rank: the first has the name that the user gave."""
    return Path(f"{file}.rank{rank}" if rank else file)


def check_trace_file(file: str) -> None:
    """Refuses a name under which no trace can be written.

    Raises:
        MoEPrefetchError: its directory is missing or cannot be written, or it is a
            directory itself.
    """
    path = Path(file)
    reason = None
    if path.is_dir():
        reason = "is a directory"
    elif not path.absolute().parent.is_dir():
        reason = "is in a directory that does not exist"
    elif not os.access(path.absolute().parent, os.W_OK | os.X_OK):
        reason = "is in a directory that this user cannot write"
    if reason:
        raise MoEPrefetchError(
            f"--moe-gpu-prefetch-config.trace: {file} {reason}. Name a file in a "
            "directory of your own."
        )


def create_trace(path: Path) -> int:
    """Creates a trace file for this user alone. A file that is there already is kept as
    `NAME.previous`, and the one before it is lost.

    Returns:
        A descriptor.

    Raises:
        OSError: the directory cannot be written.
    """
    if path.exists():
        path.replace(path.with_name(f"{path.name}.previous"))
    return create_own(path)


class _Reader:
    """What was read of a layer's ring and is not yet written.

    Attributes:
        steps: the layer's count of steps at the last look.
    """

    def __init__(self, number: int, manager: SlotManager, ring: TraceRing):
        self._number, self._counters, self._ring = number, manager.counters, ring
        self._set_bytes = -(-manager.num_experts // 8)
        self._read = 0  # the last step that was read or lost
        self._runs: list[tuple[int, list[np.ndarray]]] = []
        self.steps = 0

    @property
    def pending(self) -> int:
        """Steps that were read and not written."""
        return sum(len(records) for _, run in self._runs for records in run)

    def look(self) -> bool:
        """Reads the steps that the last look found counted. Writes of a GPU arrive in
        any order; those of these steps have arrived by now. Returns whether new steps
        are counted."""
        counted, self.steps = self.steps, self._counters.steps
        first = max(self._read + 1, counted + 1 - RECORDS)
        if first <= counted:
            records = self._ring.read(first, counted)
            numbers = np.arange(first, counted + 1)
            lost = numbers < TraceRing.oldest(self._counters.steps)
            lost |= records[:, 0] != numbers.astype(np.int32)
            kept = int(lost.nonzero()[0][-1]) + 1 if lost.any() else 0
            if first + kept > self._read + 1 or not self._runs:
                self._runs.append((first + kept, []))
            self._runs[-1][1].append(records[kept:])
            self._read = counted
        return self.steps > counted

    def frames(self) -> bytes:
        """The pending steps as frames. They are pending no more."""
        written = b""
        for first, run in self._runs:
            records = np.concatenate(run)
            if not len(records):
                continue
            sets = records[:, HEAD:].copy().view(np.uint8)[:, : self._set_bytes]
            content = format.pack_steps(records[:, 1], sets)
            written += format.frame(
                format.STEPS, content, self._number, len(records), first
            )
        self._runs.clear()
        return written


class TraceRecorder:
    """Reads the rings of a worker's layers and appends to the worker's file, in a
    thread of its own.

    Nothing is added to a step but the writing of its record. The thread reads host
    memory and never waits for a GPU. Where it falls behind by more than a ring holds,
    the steps that it missed are a gap in the file. If the file cannot be written, the
    recording ends with one line in the log, and the engine goes on.

    Args:
        path: of the file, which is created.
        limit: bytes of the file, at most.
        header: the first frame.
        managers: of the layers in the order of the header.

    Raises:
        OSError: the file cannot be created.
    """

    def __init__(
        self,
        path: Path,
        limit: int,
        header: format.Header,
        managers: Mapping[str, SlotManager],
    ):
        self._path, self._limit, self._size = path, limit, 0
        self._managers = managers
        self._readers = [
            _Reader(number, manager, manager.ring)
            for number, manager in enumerate(managers.values())
            if manager.ring is not None
        ]
        self._file: int | None = create_trace(path)
        self._busy_seconds, self._state_due = 0.0, False
        self._append(
            format.MAGIC
            + format.frame(format.HEADER, header.model_dump_json().encode())
        )
        self._closed = threading.Event()
        self._thread = threading.Thread(
            target=self._run, name="expert-trace", daemon=True
        )
        self._thread.start()

    def _run(self) -> None:
        flushed = before = time.monotonic()
        idle = 0
        while self._file is not None and not self._closed.wait(POLL_S):
            busy = self._look()
            now = time.monotonic()
            if busy:
                self._busy_seconds += now - before
            before, idle = now, 0 if busy else idle + 1
            if idle == _IDLE_POLLS or now > flushed + FLUSH_S:
                self._flush(idle >= _IDLE_POLLS)
                flushed = now

    def _look(self) -> bool:
        return any([reader.look() for reader in self._readers])

    def _flush(self, idle: bool) -> None:
        """Writes the pending steps, and the counters if no step was made meanwhile."""
        pending = any(reader.pending for reader in self._readers)
        if not pending and not (idle and self._state_due):
            return
        data = b"".join(reader.frames() for reader in self._readers)
        self._state_due = not idle
        if idle:
            state = format.State(
                busy_seconds=self._busy_seconds,
                totals={name: self._totals(m) for name, m in self._managers.items()},
            )
            data += format.frame(format.STATE, state.model_dump_json().encode())
        self._append(data)

    @staticmethod
    def _totals(manager: SlotManager) -> dict[str, int]:
        values = manager.counters.as_dict()
        return {name: values[name] for name in TOTALS}

    def _append(self, data: bytes) -> None:
        if self._size + len(data) + _LAST_FRAME > self._limit:
            self._end("limit")
            logger.warning(
                "Trace: %s has reached its limit, so later steps are not recorded. "
                "Raise --moe-gpu-prefetch-config.trace_limit for a longer one.",
                self._path,
            )
        else:
            self._write(data)

    def _write(self, data: bytes) -> None:
        if self._file is None:
            return
        try:
            with open(self._file, "wb", closefd=False) as file:
                file.write(data)
            self._size += len(data)
        except OSError as error:
            logger.warning(
                "Trace: %s could not be written, so the recording ends: %s",
                self._path,
                error,
            )
            self._forget()

    def _end(self, reason: Literal["closed", "limit"]) -> None:
        end = format.End(reason=reason).model_dump_json().encode()
        self._write(format.frame(format.END, end))
        self._forget()

    def _forget(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def close(self) -> None:
        """Writes what is pending and ends the file. A second call changes nothing."""
        self._closed.set()
        # The thread itself gets here if it garbage-collects a dropped engine.
        if self._thread is not threading.current_thread():
            self._thread.join(_PATIENCE_S)
            if self._thread.is_alive():
                return
        if self._file is None:
            return
        self._look()  # reads what the thread saw counted
        self._flush(idle=not self._look())
        self._end("closed")
