# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Runs a kernel's PTX on the CPU, thread by thread in random order, and finds data
races.

Triton's interpreter runs a program as one thread. Here the program is what a GPU would
run: warps of 32 lanes that go ahead at random, lanes of one warp that part at random
(as since Volta they may), loads and stores that are checked for bounds and alignment,
shared memory that begins as garbage. Between two barriers of the block, a byte that one
thread writes and another thread reads or writes is a race:

    ww-same   several threads write the same value: harmless
    ww-diff   several threads write different values: the last one wins
    rw        one reads what another writes; whether the value matters is found out by
              running the launch again with those reads replaced by garbage
              (`Launch.poison`)

Only what Triton emits for integer kernels is implemented; an unknown opcode raises.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from tests.ptx.ptx_state import (
    LANE,
    LANES,
    LOCAL_BASE,
    LOCAL_BYTES,
    SHARED_BASE,
    Access,
    Array,
    Memory,
    SimulationError,
    conflicts,
)


@dataclass
class Instruction:
    opcode: list[str]
    operands: list[str]
    guard: str | None
    negated: bool
    place: str  # file:line of the source


@dataclass
class Program:
    """A kernel's PTX, ready to run."""

    name: str
    parameters: list[tuple[str, str]]  # type, name
    instructions: list[Instruction]
    labels: dict[str, int]
    block: int
    actions: list[Callable] = field(default_factory=list)
    registers: dict[str, int] = field(default_factory=dict)


class Warp:
    def __init__(self, index: int, registers: int):
        self.index = index
        self.regs: list[Array] = [None] * registers  # type: ignore[list-item]
        self.threads = index * LANES + LANE
        self.order = 0  # warp-wide memory barriers so far
        self.local = np.zeros((LANES, LOCAL_BYTES), np.uint8)


class Fiber:
    """Lanes of a warp that are at the same place."""

    def __init__(self, warp: Warp, mask: Array, pc: int):
        self.warp, self.pc = warp, pc
        self.waits = ""  # "", "block", "warp" or "end"
        self.take(mask)

    def take(self, mask: Array) -> None:
        self.mask, self.whole = mask, bool(mask.all())


@dataclass(frozen=True)
class Race:
    """One kind of race."""

    space: str  # "global" or "shared"
    kind: str  # "ww-same", "ww-diff" or "rw"
    scope: str  # between "warps", "lanes" of one warp or "blocks"
    places: tuple[str, ...]  # file:line of all that take part

    def __str__(self) -> str:
        return (
            f"{self.space} {self.kind} between {self.scope} at {', '.join(self.places)}"
        )


class Launch:
    """One launch of a program: `run` it once.

    Attributes:
        races: how many bytes (granules) raced, by kind.
        racy_reads: (block, interval, pc) -> which threads read what another one writes.
        poison: reads to replace by garbage, in the form of `racy_reads`.
        split: how often a fiber's lanes part, per turn it gets.
        ordering: places (file:line) of the barriers that order global memory; None for
            all. Others order shared memory alone, as Triton's own are meant to.
        instructions, barriers: executed by fibers, and passed by blocks.
    """

    def __init__(
        self,
        program: Program,
        memory: Memory,
        arguments: Sequence[int],
        grid: int,
        shared_bytes: int,
        rng: np.random.Generator,
        poison: dict | None = None,
        split: float = 0.02,
        ordering: frozenset[str] | None = None,
    ):
        self.program, self.memory, self.grid, self.rng = program, memory, grid, rng
        self.arguments = dict(
            zip((n for _, n in program.parameters), arguments, strict=False)
        )
        self.shared_bytes, self.poison, self.split = shared_bytes, poison or {}, split
        self.ordering = ordering
        self.races: Counter[Race] = Counter()
        self.racy_reads: dict = defaultdict(set)
        self.instructions = self.barriers = 0
        self.counts: Counter[str] = Counter()

    def run(self) -> None:
        of_blocks = []
        for block in self.rng.permutation(self.grid).tolist():
            of_blocks += Block(self, block).run()
        if self.grid > 1:
            for _, which, thread, write, value in conflicts(of_blocks):
                self._report(
                    "global", "blocks", of_blocks, which, thread, write, value, None
                )

    def _report(self, space, scope, accesses, which, thread, write, value, key) -> None:
        """Counts the race of one granule, and notes the threads that read what another
        writes."""
        writers = set(thread[write].tolist())
        racy = {
            (accesses[i].pc, t)
            for i, t in zip(
                which[~write].tolist(), thread[~write].tolist(), strict=True
            )
            if writers - {t}
        }
        pcs = {accesses[i].pc for i in which[write].tolist()}
        if len(writers) > 1:
            kind = "ww-same" if len(set(value[write].tolist())) == 1 else "ww-diff"
            self._count(space, kind, scope, pcs)
        if racy:
            self._count(space, "rw", scope, pcs | {pc for pc, _ in racy})
            if key is not None:
                for pc, t in racy:
                    self.racy_reads[*key, pc].add(t)

    def _count(self, space: str, kind: str, scope: str, pcs: set[int]) -> None:
        places = tuple(sorted({self.program.instructions[pc].place for pc in pcs}))
        self.races[Race(space, kind, scope, places)] += 1


def _local(warp: Warp, mask: Array, at: Array, size: int) -> tuple[Array, Array]:
    """Where in `Warp.local` the lanes' addresses are."""
    offset = (at - np.uint64(LOCAL_BASE)).astype(np.int64)
    if np.any((offset < 0) | (offset + size > LOCAL_BYTES)):
        raise SimulationError("a generic address that is not on the stack")
    return np.flatnonzero(mask)[:, None], offset[:, None] + np.arange(size)


class Block:
    """One thread block: its warps in an order of chance, from barrier to barrier."""

    def __init__(self, launch: Launch, index: int):
        self.launch, self.index, self.rng = launch, index, launch.rng
        self.chance = random.Random(int(launch.rng.integers(1 << 62)))
        self.program = launch.program
        count = self.program.block // LANES
        self.warps = [Warp(w, len(self.program.registers)) for w in range(count)]
        self.fibers = [Fiber(w, np.ones(LANES, bool), 0) for w in self.warps]
        self.shared = Memory()
        size = max(launch.shared_bytes, 1)
        self.shared.add(self.rng.integers(0, 256, size, np.uint8), SHARED_BASE)
        self.interval = 0  # how often global memory was ordered
        self.log: dict[str, list[Access]] = {"global": [], "shared": []}
        self.whole_log: list[Access] = []

    def run(self) -> list[Access]:
        """Runs to the end. Returns the global accesses, for `Launch` to compare blocks;
        their threads are the block's number."""
        while ready := [f for f in self.fibers if not f.waits]:
            fiber = self.chance.choice(ready)
            self._advance(fiber, self.chance.choice((1, 4, 30, 10_000)))
            if fiber.waits == "warp":
                self._meet(fiber)
            if not any(not f.waits for f in self.fibers):
                self._pass_barrier()
        if any(f.waits != "end" for f in self.fibers):
            raise SimulationError(
                f"deadlock: {[(f.warp.index, f.waits, f.pc) for f in self.fibers]}"
            )
        self._find_races()
        return self.whole_log

    def _advance(self, fiber: Fiber, budget: int) -> None:
        """Runs `fiber` until it waits, at most `budget` instructions."""
        actions = self.program.actions
        if self.chance.random() < self.launch.split:
            self._split(fiber, fiber.mask & (self.rng.random(LANES) < 0.5))
        for _ in range(budget):
            self.launch.instructions += 1
            actions[fiber.pc](self, fiber)
            if fiber.waits:
                break

    def _split(self, fiber: Fiber, part: Array) -> None:
        """Lanes `part` of `fiber` go on as a fiber of their own."""
        if part.any() and not part[fiber.mask].all():
            self.fibers.append(Fiber(fiber.warp, part, fiber.pc))
            fiber.take(fiber.mask & ~part)

    def _meet(self, fiber: Fiber) -> None:
        """A warp-wide instruction runs once all lanes of the warp that still run are
        there."""
        mine = [f for f in self.fibers if f.warp is fiber.warp and f.waits != "end"]
        if all(f.waits == "warp" and f.pc == fiber.pc for f in mine):
            self._merge(mine)
            mine[0].waits = ""
            self.program.actions[mine[0].pc](self, mine[0], met=True)

    def _merge(self, fibers: list[Fiber]) -> None:
        if len(fibers) > 1:
            fibers[0].take(np.logical_or.reduce([f.mask for f in fibers]))
            for other in fibers[1:]:
                self.fibers.remove(other)

    def _pass_barrier(self) -> None:
        """All threads of the block wait (or have ended): on they go."""
        at = [f for f in self.fibers if f.waits == "block"]
        if not at or any(f.waits == "warp" for f in self.fibers):
            return
        if len({f.pc for f in at}) > 1 or any(f.waits == "end" for f in self.fibers):
            raise SimulationError(
                "threads wait at different barriers, or some have ended"
            )
        ordering = self.launch.ordering
        if ordering is None or self.program.instructions[at[0].pc].place in ordering:
            self._find_races()
            self.interval += 1
        else:
            self._find_races("shared")
        self.launch.barriers += 1
        for warp in self.warps:
            self._merge(mine := [f for f in self.fibers if f.warp is warp])
            mine[0].waits = ""
            mine[0].pc += 1

    def _find_races(self, *spaces: str) -> None:
        """Those since it was called last, in the spaces named, or in both."""
        spaces = spaces or ("global", "shared")
        for space in spaces:
            log = self.log[space]
            for _, which, thread, write, value in conflicts(log):
                orders = {
                    (thread[i] // LANES, log[w].order) for i, w in enumerate(which)
                }
                warps = {warp for warp, _ in orders}
                if len(warps) == 1 and len(orders) == len(which):
                    continue  # one warp, each access behind a warp barrier of its own
                scope = (
                    "warps"
                    if len({t // LANES for t in thread[write]} | warps) > 1
                    else "lanes"
                )
                key = (self.index, self.interval) if space == "global" else None
                self.launch._report(space, scope, log, which, thread, write, value, key)
        if self.launch.grid > 1 and "global" in spaces:
            for a in self.log["global"]:
                a.threads = np.full(len(a.threads), self.index)
            self.whole_log += self.log["global"]
        self.log |= {space: [] for space in spaces}

    # what instructions call

    def load(
        self, space: str, pc: int, warp: Warp, mask: Array, at: Array, size: int
    ) -> Array:
        """[lanes] addresses -> [lanes, size] bytes; notes the access."""
        place = self.program.instructions[pc].place
        if space == "local":
            return warp.local[_local(warp, mask, at, size)]
        values = (self.launch.memory if space == "global" else self.shared).load(
            at, size, place
        )
        self.note(space, pc, warp, mask, False, at, values)
        return (
            self.poisoned(pc, warp.threads[mask], values)
            if self.launch.poison
            else values
        )

    def store(
        self, space: str, pc: int, warp: Warp, mask: Array, at: Array, values: Array
    ) -> None:
        place = self.program.instructions[pc].place
        if space == "local":
            warp.local[_local(warp, mask, at, values.shape[1])] = values
            return
        order = self.rng.permutation(len(at))  # of lanes that write one place
        memory = self.launch.memory if space == "global" else self.shared
        memory.store(at[order], values[order], place)
        self.note(space, pc, warp, mask, True, at, values)

    def note(
        self,
        space: str,
        pc: int,
        warp: Warp,
        lanes: Array,
        write: bool,
        address,
        values,
    ):
        self.log[space].append(
            Access(pc, write, warp.threads[lanes], address, values.copy(), warp.order)
        )

    def poisoned(self, pc: int, threads: Array, values: Array) -> Array:
        targets = self.launch.poison.get((self.index, self.interval, pc))
        if targets:
            hit = np.isin(threads, list(targets))
            values = values.copy()
            values[hit] = self.rng.integers(0, 256, values[hit].shape, np.uint8)
        return values
