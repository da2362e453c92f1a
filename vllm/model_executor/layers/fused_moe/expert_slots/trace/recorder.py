# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Writes the steps of a worker's layers to a trace file."""

import os
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from vllm.logger import init_logger

from vllm.model_executor.layers.fused_moe.expert_slots.background import (
    BackgroundThread,
)
from vllm.model_executor.layers.fused_moe.expert_slots.counters import (
    TOTALS,
    SlotCounters,
)
from vllm.model_executor.layers.fused_moe.expert_slots.trace import format
from vllm.model_executor.layers.fused_moe.expert_slots.trace.file import create_trace
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

IDLE_S = 1.0
"""Seconds without a new step after which the engine is idle. Shorter pauses are taken
for slow steps."""

_LAST_FRAME = 64
"""Bytes that are kept for the last frame."""


class _Reader:
    """What was read of a layer's ring and is not yet written.

    Attributes:
        totals: the layer's counters after the last step that was read; None if they
            were seen while they changed.
    """

    def __init__(self, number: int, ring: TraceRing, counters: SlotCounters):
        self._number, self._ring, self._counters = number, ring, counters
        self._read = 0  # the last step that was read or lost
        self._runs: list[tuple[int, list[np.ndarray]]] = []
        self._seen: dict[str, int] = dict.fromkeys(TOTALS, 0)
        self.totals: dict[str, int] | None = None

    @property
    def pending(self) -> int:
        """Steps that were read and not written."""
        return sum(len(records) for _, run in self._runs for records in run)

    def look(self) -> bool:
        """Reads the steps that the last look found counted. Writes of a GPU arrive in
        any order; those of these steps have arrived by now. Returns whether new steps
        are counted.

        Raises:
            RuntimeError: the counters went back.
        """
        before, now = self._seen, self._counters.as_dict()
        self._seen = {name: now[name] for name in TOTALS}
        counted = before["steps"]
        if now["steps"] < counted:
            raise RuntimeError("the slots were reset while it recorded")
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
        self.totals = before if self._agree(before) else None
        return now["steps"] > counted

    def _agree(self, totals: dict[str, int]) -> bool:
        """Whether totals are those of one moment: a GPU may write them piece by
        piece."""
        return (
            totals["hits"] + totals["misses"] == totals["needed"]
            and totals["staged"] + totals["evictions"] == totals["loads"]
            and totals["loads"] == totals["misses"]
            and totals["bytes_loaded"] * self._counters.experts
            == totals["loads"] * self._counters.store_bytes
        )

    def frames(self) -> bytes:
        """The pending steps as frames. They are pending no more."""
        written = b""
        for first, run in self._runs:
            records = np.concatenate(run)
            if not len(records):
                continue
            sets = records[:, HEAD:].copy().view(np.uint8)[:, : self._ring.set_bytes]
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
        layers: the ring and the counters of each layer, by name, in the order of the
            header.

    Raises:
        MoEPrefetchError: there is another file of that name.
        OSError: the file cannot be created.
    """

    def __init__(
        self,
        path: Path,
        limit: int,
        header: format.Header,
        layers: Mapping[str, tuple[TraceRing, SlotCounters]],
    ):
        self._path, self._limit, self._size = path, limit, 0
        self._readers = {
            name: _Reader(number, ring, counters)
            for number, (name, (ring, counters)) in enumerate(layers.items())
        }
        self._file: int | None = create_trace(path)
        self._busy_seconds = 0.0
        self._changed = -np.inf  # when a step was counted last
        first = format.frame(format.HEADER, header.model_dump_json().encode())
        self._write(format.MAGIC + first)
        self._thread = BackgroundThread("expert-trace", self._run)
        self._thread.start()

    @property
    def recording(self) -> bool:
        return self._file is not None

    def _run(self) -> None:
        flushed, idle = time.monotonic(), False
        try:
            while self.recording and self._thread.pause(POLL_S):
                self._look()
                now = time.monotonic()
                was_idle, idle = idle, now > self._changed + IDLE_S
                if idle > was_idle or now > flushed + FLUSH_S:
                    self._flush()
                    flushed = now
        except Exception as error:
            self._give_up(error)

    def _look(self) -> bool:
        """Returns whether new steps are counted."""
        changed = any([reader.look() for reader in self._readers.values()])
        if changed:
            now = time.monotonic()
            pause = now - self._changed
            self._busy_seconds += pause if pause < IDLE_S else POLL_S
            self._changed = now
        return changed

    def _flush(self) -> None:
        """Writes the pending steps and the state after them."""
        readers = self._readers
        if not any(reader.pending for reader in readers.values()):
            return
        steps = b"".join(reader.frames() for reader in readers.values())
        state = format.State(
            busy_seconds=self._busy_seconds,
            totals={n: r.totals for n, r in readers.items() if r.totals is not None},
        )
        content = zlib.compress(state.model_dump_json().encode())
        self._append(steps + format.frame(format.STATE, content))

    def _append(self, data: bytes) -> None:
        if self._size + len(data) + _LAST_FRAME <= self._limit:
            self._write(data)
            return
        self._end("limit")
        logger.warning(
            "Trace: %s has reached its limit, so later steps are not recorded. Raise "
            "--moe-gpu-prefetch-config.trace_limit for a longer one.",
            self._path,
        )

    def _write(self, data: bytes) -> None:
        if self._file is None:
            return
        try:
            with open(self._file, "wb", closefd=False) as file:
                file.write(data)
            self._size += len(data)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        logger.warning("Trace: the recording of %s ends: %s", self._path, error)
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
        if not (self._thread.end() and self.recording):
            return
        try:
            if self._look():
                time.sleep(POLL_S)  # as between any two looks
            self._look()
            self._flush()
            self._end("closed")
        except Exception as error:
            self._give_up(error)
