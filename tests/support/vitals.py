# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Memory and open descriptors of a server and everything below it, sampled while it
runs."""

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import psutil

from tests.support.server import Server

EVERY_S = 2.0


@dataclass(frozen=True)
class Vitals:
    """Sums over all processes: resident bytes, open descriptors."""

    seconds: float
    rss: int
    descriptors: int


def vitals(server: Server) -> Vitals:
    rss = descriptors = 0
    for process in server.tree():
        with suppress(psutil.NoSuchProcess):
            rss += process.memory_info().rss
            descriptors += process.num_fds()
    return Vitals(time.monotonic(), rss, descriptors)


@asynccontextmanager
async def watching(server: Server) -> AsyncIterator[list[Vitals]]:
    """A list that fills with samples for as long as the block runs."""
    samples: list[Vitals] = []

    async def sample() -> None:
        while True:
            samples.append(await asyncio.to_thread(vitals, server))
            await asyncio.sleep(EVERY_S)

    task = asyncio.create_task(sample())
    try:
        yield samples
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def growth(values: Sequence[int]) -> int:
    """From the median of the first quarter to that of the last."""
    quarter = max(1, len(values) // 4)
    return int(
        statistics.median(values[-quarter:]) - statistics.median(values[:quarter])
    )
