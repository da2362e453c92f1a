# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""`benchmarks/cpu/endurance.py` for a minute."""

import asyncio

from benchmarks.cpu.endurance import Findings, endure
from tests.support.load import Expected, requests

CLIENTS = 64


def test_a_minute_under_load(servers):
    """Every answer is the one that stock gives to the request alone, under load as
    afterwards; malformed requests get stock's status; memory and descriptors stay flat;
    then the server is idle, its tables and slots agree and its counters add up. Many
    steps overflowed. Stock passes the same load with the same answers."""
    slots, stock = servers

    async def run() -> tuple[Findings, Findings]:
        expected = await Expected.of(stock, requests(32))
        by_stock = await endure(stock, expected, CLIENTS, seconds=10, warm_up=5)
        return by_stock, await endure(slots, expected, CLIENTS, seconds=60, warm_up=20)

    by_stock, by_slots = asyncio.run(run())
    assert by_stock.tally.wrong == []
    assert by_slots.faults == []
    assert all(
        by_slots.tally.ended[end] for end in ("finished", "cancelled", "malformed")
    )
    assert by_slots.overflow > 0.1  # of the steps; a faster machine has smaller batches
