# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A server under load for a long time. Stock vLLM answers a pool of requests one at a
time. Then many clients ask stock, which shows that its answers do not depend on the
batch. Then they ask a server with few slots, and each answer must be stock's. The exit
status is 1 if anything was wrong.

Greedy and in float32: in bfloat16 stock's own tokens move with the batch.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks import results
from tests.support import ROOT
from tests.support.load import Expected, Load, Tally, answers, requests
from tests.support.sample import make_checkpoint
from tests.support.server import Server, serving
from tests.support.vitals import Vitals, growth, vitals, watching

SLOTS, EXPERTS = 8, 32
OPTIONS = (
    *("--max-model-len", "1024", "--dtype", "float32", "--enforce-eager"),
    # Every prompt is computed, in chunks; the KV cache is too small for all clients, so
    # that requests are preempted.
    *("--no-enable-prefix-caching", "--max-num-batched-tokens", "512"),
    *("--max-num-seqs", "64", "--num-gpu-blocks-override", "64"),
)
ENVIRONMENT = {
    # Offers the RPC that checks the tables.
    "VLLM_SERVER_DEV_MODE": "1",
    # oneDNN keeps a primitive for every number of tokens that a step had, up to 1,024:
    # some 200 MiB that take an hour to fill.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0",
}
RSS_GROWTH = 0.01
"""About three times what stock moves by: two kilobytes for each request of ten
minutes."""

SETTLED_S = 3
"""After the last request: its connection is closed, its blocks are free."""

CLOSED_S = 30
"""In which a server closes the last connections."""

OTHER_CONNECTIONS = 8
"""Connections that a client has closed and the server has not yet."""

NOTE = f"""Wrong: a finished answer whose tokens, text and reason to end are not those
that stock gave to the request alone; a closed stream that is no beginning of that
answer; a malformed request whose status is not stock's. RSS and descriptors: sums over
the server's processes; growth from the median of the first quarter of the samples to
that of the last. Faults: any of these, memory that grew by more than {RSS_GROWTH:.0%},
a descriptor left open; or, once idle: /health, requests or blocks still held, an answer
that is not stock's, tables, slots or counters that do not agree."""

console = Console()


def checkpoint(directory: Path) -> Path:
    """A Qwen3-MoE whose steps take long enough for batches to fill."""
    return make_checkpoint(directory, experts=EXPERTS, expert_width=256, hidden=256)


@dataclass
class Findings:
    """What a server did under load."""

    tally: Tally
    seconds: float
    idle: Vitals
    samples: list[Vitals]
    end: Vitals
    metrics: dict[str, float]
    faults: list[str]

    def moved(self, name: str) -> int:
        return int(self.metrics.get(name, 0))

    @property
    def overflow(self) -> float:
        steps = self.moved("vllm:moe_prefetch_steps_total")
        return self.moved("vllm:moe_prefetch_overflow_steps_total") / max(1, steps)

    @property
    def rss(self) -> list[int]:
        return [sample.rss for sample in self.samples]

    @property
    def descriptors(self) -> list[int]:
        return [sample.descriptors for sample in self.samples]


async def endure(
    server: Server, expected: Expected, clients: int, seconds: float, warm_up: float
) -> Findings:
    """Loads `server`, the warm-up included in the comparisons but not in the growth,
    and looks at it once more when it is idle again."""
    idle, before = vitals(server), server.metrics()
    load = Load(server, expected, clients)
    await load.run(warm_up)
    begin = time.monotonic()
    async with watching(server) as samples:
        await load.run(seconds)
    took = time.monotonic() - begin
    await asyncio.sleep(SETTLED_S)
    after, end = server.metrics(), await _settled(server, idle)
    moved = {name: value - before.get(name, 0) for name, value in after.items()}
    wrong = list(load.tally.wrong)
    findings = Findings(load.tally, warm_up + took, idle, samples, end, moved, wrong)
    findings.faults += _vitals_faults(findings, clients) + await _idle_faults(
        server, expected
    )
    if any(name.startswith("vllm:moe_prefetch") for name in after):
        findings.faults += _slots_faults(server)
    return findings


async def _settled(server: Server, idle: Vitals) -> Vitals:
    """Once no connection is open that was not there before, on a busy machine up to
    `CLOSED_S` later."""
    until = time.monotonic() + CLOSED_S
    while (end := vitals(server)).descriptors > idle.descriptors and (
        time.monotonic() < until
    ):
        await asyncio.sleep(1)
    return end


def _vitals_faults(findings: Findings, clients: int) -> list[str]:
    faults = []
    grown, begin = growth(findings.rss), findings.rss[0]
    if grown > RSS_GROWTH * begin:
        faults.append(f"memory grew by {grown:,} bytes from {begin:,}")
    idle, most, end = (
        findings.idle.descriptors,
        max(findings.descriptors),
        findings.end.descriptors,
    )
    if most > idle + clients + OTHER_CONNECTIONS or end > idle:
        faults.append(f"descriptors: {idle} before, at most {most}, {end} afterwards")
    return faults


async def _idle_faults(server: Server, expected: Expected) -> list[str]:
    """What is not as it was before the load."""
    faults = []
    if not server.healthy():
        faults.append("/health is not 200")
    again = await answers(server, expected.pool)
    faults += [
        f"request {number}, afterwards: {one} instead of {right}"
        for number, (one, right) in enumerate(zip(again, expected.answers, strict=True))
        if one != right
    ]
    metrics = server.metrics()
    for name in (
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
    ):
        if metrics[name] != 0:
            faults.append(f"{name} is {metrics[name]} at the end")
    return faults


def _slots_faults(server: Server) -> list[str]:
    """Tables, slots and counters that do not agree; the server must answer the RPC."""
    faults = []
    for rank in server.rpc("expert_slot_residency"):
        for layer, residents in rank.items():
            if len(set(residents)) != SLOTS:
                faults.append(f"{layer} holds {residents}")
    metrics = server.metrics()
    total = {
        name: metrics[f"vllm:moe_prefetch_{name}_total"]
        for name in ("needed", "hits", "misses", "loads")
    }
    if (
        total["hits"] + total["misses"] != total["needed"]
        or total["loads"] != total["misses"]
    ):
        faults.append(f"the counters do not add up: {total}")
    return faults


def table(servers: dict[str, Findings], clients: int) -> Table:
    """One column for each server."""
    result = Table("", *servers, title=f"{clients} clients")

    def row(name: str, values: list[object]) -> None:
        result.add_row(
            name, *(f"{v:,}" if isinstance(v, int) else str(v) for v in values)
        )

    every = list(servers.values())
    row("seconds under load", [round(f.seconds) for f in every])
    for kind in ("finished", "cancelled", "malformed"):
        row(f"requests {kind}", [f.tally.ended[kind] for f in every])
    row("wrong", [len(f.tally.wrong) for f in every])
    row("tokens compared", [f.tally.tokens for f in every])
    row("preemptions", [f.moved("vllm:num_preemptions_total") for f in every])
    row(
        "steps of a layer",
        [f.moved("vllm:moe_prefetch_steps_total") or "" for f in every],
    )
    row("overflow steps", [f"{f.overflow:.0%}" if f.overflow else "" for f in every])
    row(
        "experts loaded",
        [f.moved("vllm:moe_prefetch_loads_total") or "" for f in every],
    )
    row("samples", [len(f.samples) for f in every])
    row("RSS, MiB", [f.rss[0] >> 20 for f in every])
    row("RSS growth", [f"{growth(f.rss) / f.rss[0]:+.2%}" for f in every])
    row("descriptors idle", [f.idle.descriptors for f in every])
    row("descriptors under load, at most", [max(f.descriptors) for f in every])
    row("descriptors afterwards", [f.end.descriptors for f in every])
    row("faults", [len(f.faults) for f in every])
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--minutes", type=float, default=10, help="under load, with slots"
    )
    parser.add_argument(
        "--stock-minutes", type=float, default=2, help="under load, without"
    )
    parser.add_argument(
        "--warm-up", type=float, default=60, help="seconds before memory counts"
    )
    parser.add_argument("--clients", type=int, default=64)
    results.save_option(parser)
    arguments = parser.parse_args()
    work = ROOT / ".demo"
    work.mkdir(exist_ok=True)
    model = checkpoint(work / "qwen3-moe-endurance")
    with tempfile.TemporaryDirectory() as logs:
        result = asyncio.run(run(model, Path(logs), arguments))
    columns = table(result, arguments.clients)
    console.print(columns)
    for server, findings in result.items():
        for fault in findings.faults[:20]:
            console.print(f"{server}: {fault}", markup=False)
    if arguments.save:
        console.print(f"kept in {results.save_tables('endurance', [columns], NOTE)}")
    return int(any(findings.faults for findings in result.values()))


async def run(
    model: Path, logs: Path, arguments: argparse.Namespace
) -> dict[str, Findings]:
    """Stock, then slots; one after the other, so that each has the machine to
    itself."""
    pool, clients, warm_up = requests(64), arguments.clients, arguments.warm_up
    result = {}
    with serving(model, logs / "stock.log", *OPTIONS, **ENVIRONMENT) as server:
        console.print("stock vLLM answers, one request at a time")
        expected = await Expected.of(server, pool)
        console.print(f"stock vLLM under {clients} clients")
        minutes = arguments.stock_minutes
        result["stock"] = await endure(server, expected, clients, minutes * 60, warm_up)
    slots = ("--moe-gpu-prefetch", str(SLOTS))
    with serving(model, logs / "slots.log", *OPTIONS, *slots, **ENVIRONMENT) as server:
        console.print(f"{SLOTS} slots of {EXPERTS} experts under {clients} clients")
        minutes = arguments.minutes
        result[f"{SLOTS} slots"] = await endure(
            server, expected, clients, minutes * 60, warm_up
        )
    return result


if __name__ == "__main__":
    sys.exit(main())
