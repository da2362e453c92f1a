# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""PTX read and turned into what `ptxsim` runs: each instruction a function of (block,
fiber)."""

import re
from collections.abc import Callable

import numpy as np

from tests.ptx.ptxsim import (
    ALL,
    LANE,
    LANES,
    LOCAL_BASE,
    SHARED_BASE,
    SIGNED,
    UNSIGNED,
    Array,
    Block,
    Fiber,
    Instruction,
    Program,
    SimulationError,
    Warp,
)


def _dtype(name: str) -> type:
    """`s32` -> int32; `b`, `u` -> unsigned."""
    width = int(name[1:]) // 8
    return SIGNED[width] if name[0] == "s" else UNSIGNED[width]


_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")


def parse(ptx: str) -> Program:
    """Reads the one entry of `ptx`."""
    files = dict(re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', ptx))
    name = re.search(r"\.entry\s+(\w+)", ptx)[1]  # type: ignore[index]
    head, _, body = ptx[ptx.index(".entry") :].partition("{\n")
    parameters = re.findall(r"\.param\s+\.(\w+)\s+[^,)]*?(\w+_param_\d+)", head)
    block = int(re.search(r"\.(?:req|max)ntid\s+(\d+)", head)[1])  # type: ignore[index]
    program = Program(name, parameters, [], {}, block)
    place = "?"
    for line in body.splitlines():
        if line.startswith("}"):
            break
        if where := re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", line):
            inlined = re.search(r"inlined_at\s+(\d+)\s+(\d+)", line)
            file, number = inlined.groups() if inlined else where.groups()
            if number != "0":
                place = f"{files.get(file, '?').rpartition('/')[2]}:{number}"
            continue
        line = line.partition("//")[0].strip()
        if label := re.match(r"(\$\w+):$", line):
            program.labels[label[1]] = len(program.instructions)
            continue
        if not line or line.startswith("."):
            continue
        for statement in filter(None, map(str.strip, line.split(";"))):
            if statement in "{}":
                continue
            guard = None
            if statement[0] == "@":
                guard, _, statement = statement[1:].partition(" ")
            opcode, *rest = statement.split(None, 1)
            operands = [o.strip() for o in _OPERAND.findall(rest[0])] if rest else []
            negated = guard is not None and guard[0] == "!"
            program.instructions.append(
                Instruction(
                    opcode.replace("::", "__").split("."),
                    operands,
                    guard.lstrip("!") if guard else None,
                    negated,
                    place,
                )
            )
    _Compiler(program).compile()
    return program


_COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
_BITS = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
_REDUCE = {"add": np.add, "min": np.minimum, "max": np.maximum, **_BITS}


def _shift(left: bool, kind: type) -> Callable:
    bits = np.dtype(kind).itemsize * 8

    def run(a: Array, by: Array) -> Array:
        by = by.astype(np.uint32)
        inside = np.minimum(by, bits - 1).astype(kind)
        if left:
            return np.where(by < bits, a << inside, kind(0))
        shifted = a >> inside
        return (
            shifted
            if np.dtype(kind).kind == "i"
            else np.where(by < bits, shifted, kind(0))
        )

    return run


def _wide(kind: type) -> type:
    size = np.dtype(kind).itemsize * 2
    return (SIGNED if np.dtype(kind).kind == "i" else UNSIGNED)[size]


def _permute(a: Array, b: Array, selector: Array) -> Array:
    """prmt.b32 in its general mode."""
    both = (b.astype(np.uint64) << np.uint64(32)) | a
    out = np.zeros(LANES, np.uint32)
    for i in range(4):
        pick = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = (
            (both >> (pick & np.uint32(7)).astype(np.uint64) * np.uint64(8))
            & np.uint64(255)
        ).astype(np.uint32)
        sign = np.where(byte & 0x80, np.uint32(255), np.uint32(0))
        out |= np.where(pick & 8, sign, byte).astype(np.uint32) << np.uint32(8 * i)
    return out


def _extract(kind: type) -> Callable:
    """bfe: a field of bits, with its sign where the type has one."""
    width = np.dtype(kind).itemsize * 8

    def run(a: Array, position: Array, length: Array) -> Array:
        first, count = position.astype(np.int64) & 255, length.astype(np.int64) & 255
        left = np.maximum(width - first - count, 0)
        field = (a << left.astype(kind)) >> np.minimum(left + first, width - 1).astype(
            kind
        )
        return np.where(count > 0, field, kind(0))

    return run


class _Compiler:
    """Turns each instruction into a function of (block, fiber)."""

    def __init__(self, program: Program):
        self.program = program

    def compile(self) -> None:
        for pc, instruction in enumerate(self.program.instructions):
            family = instruction.opcode[0].partition("__")[0]
            make = getattr(self, f"_{family}", None) or self._arithmetic
            self.program.actions.append(make(pc, instruction))
        self.program.actions.append(self._ret(len(self.program.actions), None))

    # operands

    def register(self, name: str) -> int:
        return self.program.registers.setdefault(name, len(self.program.registers))

    def reader(self, operand: str, kind: type) -> Callable[[Block, Warp], Array]:
        """What reads `operand` as [32] of `kind`."""
        size = np.dtype(kind).itemsize
        if operand.startswith("%tid.x"):
            return lambda block, warp: warp.threads.astype(kind)
        if operand.startswith("%ctaid.x"):
            return lambda block, warp: np.full(LANES, block.index, kind)
        if operand.startswith("%nctaid.x"):
            return lambda block, warp: np.full(LANES, block.launch.grid, kind)
        if operand.startswith("%ntid.x"):
            return lambda block, warp: np.full(LANES, block.program.block, kind)
        if operand.startswith("%laneid"):
            return lambda block, warp: LANE.astype(kind)
        if operand.startswith(("%ctaid", "%tid", "%clusterid", "%cluster_ctaid")):
            return lambda block, warp: np.zeros(LANES, kind)
        if operand[0] == "%":
            index, dtype = self.register(operand), np.dtype(kind)

            def read(block: Block, warp: Warp) -> Array:
                value = warp.regs[index]
                if (
                    value is None
                ):  # LLVM does read what it never wrote, and then drops it
                    value = warp.regs[index] = block.rng.integers(0, 256, LANES).astype(
                        dtype
                    )
                if value.dtype is dtype:
                    return value
                if (
                    value.dtype.itemsize == size
                    and value.dtype.kind != "b"
                    and dtype.kind != "b"
                ):
                    return value.view(dtype)
                return value.astype(dtype)

            return read
        if operand.startswith("__local_depot"):
            return lambda block, warp: np.full(LANES, LOCAL_BASE, kind)
        if operand == "global_smem":
            constant = np.full(LANES, SHARED_BASE, np.uint64).astype(kind)
        elif kind is bool:
            constant = np.full(LANES, int(operand, 0) != 0)
        else:
            number = int(operand.rstrip("U"), 0) & ((1 << 8 * size) - 1)
            constant = np.full(LANES, number, UNSIGNED[size]).view(kind)
        return lambda block, warp: constant

    def writer(self, operand: str) -> Callable:
        """What writes `operand` in the lanes of a mask."""
        index = self.register(operand)
        name = operand.lstrip("%").rstrip("0123456789")
        kinds = {"p": bool, "rs": np.uint16, "r": np.uint32, "rd": np.uint64}
        kind = (kinds | {"SPL": np.uint32, "SP": np.uint64})[name]  # the stack
        size = np.dtype(kind).itemsize

        dtype = np.dtype(kind)

        def write(warp: Warp, mask: Array | None, value: Array) -> None:
            if value.dtype is not dtype:
                if (
                    value.dtype.itemsize == size
                    and dtype.kind != "b"
                    and value.dtype.kind != "b"
                ):
                    value = value.view(dtype)
                else:
                    value = value.astype(dtype)
            old = warp.regs[index]
            if mask is None:
                warp.regs[index] = value
            else:
                warp.regs[index] = np.where(
                    mask, value, np.zeros(LANES, kind) if old is None else old
                )

        return write

    def address(self, operand: str, space: str) -> Callable[[Block, Warp], Array]:
        base, _, offset = operand.strip("[] ").partition("+")
        add = np.uint64(int(offset or "0", 0) & ((1 << 64) - 1))
        read = self.reader(base.strip(), np.uint32 if space == "shared" else np.uint64)
        return lambda block, warp: read(block, warp).astype(np.uint64) + add

    def guarded(
        self, instruction: Instruction
    ) -> Callable[[Block, Fiber], Array | None]:
        """Which lanes an instruction is for; None: all 32."""
        if instruction.guard is None:
            return lambda block, fiber: None if fiber.whole else fiber.mask
        read = self.reader(instruction.guard, bool)
        if instruction.negated:
            return lambda block, fiber: fiber.mask & ~read(block, fiber.warp)
        return lambda block, fiber: fiber.mask & read(block, fiber.warp)

    # control

    def _ret(self, pc, instruction):
        def run(block, fiber):
            fiber.waits = "end"

        return run

    _exit = _ret

    def _bra(self, pc, instruction):
        target = self.program.labels[instruction.operands[0]]
        taken = self.guarded(instruction)

        def run(block, fiber):
            mask = taken(block, fiber)
            if mask is None or not (fiber.mask & ~mask).any():
                fiber.pc = target
            elif not mask.any():
                fiber.pc += 1
            else:
                block._split(fiber, mask)
                block.fibers[-1].pc = target
                fiber.pc += 1

        return run

    def _bar(self, pc, instruction):
        if instruction.opcode[1] == "warp":

            def run_warp(block, fiber, met=False):
                if not met:
                    fiber.waits = "warp"
                    return
                fiber.warp.order += 1
                fiber.pc += 1

            return run_warp
        assert instruction.guard is None and instruction.operands[0] == "0", instruction

        def run(block, fiber):
            fiber.waits = "block"

        return run

    _barrier = _bar

    # between lanes

    def _together(self, instruction, do):
        """A warp-wide instruction: `do(block, warp, mask)` once all lanes have come."""
        guard = self.guarded(instruction)

        def run(block, fiber, met=False):
            if not met:
                fiber.waits = "warp"
                return
            mask = guard(block, fiber)
            do(block, fiber.warp, fiber.mask if mask is None else mask)
            fiber.pc += 1

        return run

    def _redux(self, pc, instruction):
        _, _, operation, kind = instruction.opcode
        read = self.reader(instruction.operands[1], _dtype(kind))
        write = self.writer(instruction.operands[0])

        def do(block, warp, mask):
            total = _REDUCE[operation].reduce(
                read(block, warp)[mask], dtype=_dtype(kind)
            )
            write(warp, mask, np.full(LANES, total, _dtype(kind)))

        return self._together(instruction, do)

    def _shfl(self, pc, instruction):
        mode = instruction.opcode[2]
        target, a, b, c, _ = instruction.operands
        target, _, inside_name = target.partition("|")
        read, by, clamp = (self.reader(o, np.uint32) for o in (a, b, c))
        write = self.writer(target)
        write_inside = self.writer(inside_name) if inside_name else None

        def do(block, warp, mask):
            value, step = read(block, warp), by(block, warp).astype(np.int64) & 31
            limits = clamp(block, warp).astype(np.int64)
            segment = (limits >> 8) & 31
            top = (LANE & segment) | (limits & 31 & ~segment)
            low = LANE & segment
            if mode == "up":
                source = LANE - step
                inside = source >= top
            elif mode == "down":
                source = LANE + step
                inside = source <= top
            elif mode == "bfly":
                source = LANE ^ step
                inside = source <= top
            else:
                source = low | (step & ~segment)
                inside = source <= top
            source = np.where(inside, source, LANE)
            assert mask[source[mask]].all(), "shfl from a lane that is not there"
            write(warp, mask, value[source])
            if write_inside:
                write_inside(warp, mask, inside)

        return self._together(instruction, do)

    def _vote(self, pc, instruction):
        mode = instruction.opcode[2]
        operand = instruction.operands[1]
        negated, operand = operand[0] == "!", operand.lstrip("!")
        read, write = self.reader(operand, bool), self.writer(instruction.operands[0])

        def do(block, warp, mask):
            value = (read(block, warp) ^ negated) & mask
            result = {
                "ballot": lambda: np.uint32(
                    (value.astype(np.uint64) << LANE.astype("u8")).sum()
                ),
                "any": lambda: value.any(),
                "all": lambda: value[mask].all(),
            }[mode]()
            write(warp, mask, np.full(LANES, result))

        return self._together(instruction, do)

    def _ldmatrix(self, pc, instruction):
        """x1, x2, x4 of m8n8.b16: lane 8i+r holds the address of row r of matrix i."""
        assert "m8n8" in instruction.opcode and "trans" not in instruction.opcode, (
            instruction
        )
        count = int(next(o for o in instruction.opcode if re.fullmatch(r"x\d", o))[1:])
        address = self.address(instruction.operands[1], "shared")
        names = [n.strip() for n in instruction.operands[0].strip("{} ").split(",")]
        writers = [self.writer(n) for n in names]

        def do(block, warp, mask):
            assert mask.all()
            rows = address(block, warp)
            if np.any(rows[: 8 * count] % 16):
                raise SimulationError("ldmatrix: a row is not aligned")
            for matrix in range(count):
                at = rows[8 * matrix + LANE // 4] + (LANE % 4 * 4).astype(np.uint64)
                values = block.shared.load(at, 4, instruction.place)
                block.note("shared", pc, warp, mask, False, at, values)
                writers[matrix](warp, mask, values.view(np.uint32).ravel())

        return self._together(instruction, do)

    def _stmatrix(self, pc, instruction):
        """x1 of m8n8.b16, the counterpart: lanes 4r to 4r + 3 hold the words of row
        r."""
        assert {"m8n8", "x1"} <= set(instruction.opcode), instruction
        address = self.address(instruction.operands[0], "shared")
        read = self.reader(instruction.operands[1].strip("{} "), np.uint32)

        def do(block, warp, mask):
            assert mask.all()
            rows = address(block, warp)
            if np.any(rows[:8] % 16):
                raise SimulationError("stmatrix: a row is not aligned")
            at = rows[LANE // 4] + (LANE % 4 * 4).astype(np.uint64)
            values = (
                np.ascontiguousarray(read(block, warp)).view(np.uint8).reshape(LANES, 4)
            )
            block.store("shared", pc, warp, mask, at, values)

        return self._together(instruction, do)

    # memory

    def _memory(self, instruction):
        """Space, words of a vector, kind of a word."""
        space = next(
            (
                s
                for s in ("global", "shared")
                if any(o.startswith(s) for o in instruction.opcode)
            ),
            None,
        )
        words = next(
            (int(o[1:]) for o in instruction.opcode if re.fullmatch(r"v\d", o)), 1
        )
        return space or "local", words, _dtype(instruction.opcode[-1])

    def _ld(self, pc, instruction):
        if "param" in instruction.opcode:
            write, kind = (
                self.writer(instruction.operands[0]),
                _dtype(instruction.opcode[-1]),
            )
            name = instruction.operands[1].strip("[] ")
            guard = self.guarded(instruction)

            def run_param(block, fiber):
                number = block.launch.arguments[name] & (
                    (1 << 8 * np.dtype(kind).itemsize) - 1
                )
                value = np.full(LANES, number, np.uint64).astype(kind)
                write(fiber.warp, guard(block, fiber), value)
                fiber.pc += 1

            return run_param
        space, words, kind = self._memory(instruction)
        names = [n.strip() for n in instruction.operands[0].strip("{} ").split(",")]
        writers = [self.writer(n) for n in names]
        assert len(writers) == words, instruction
        address, guard = (
            self.address(instruction.operands[1], space),
            self.guarded(instruction),
        )
        size = words * np.dtype(kind).itemsize

        def run(block, fiber):
            mask = guard(block, fiber)
            if mask is None:
                mask = ALL
            if mask.any():
                at = address(block, fiber.warp)[mask]
                values = block.load(space, pc, fiber.warp, mask, at, size)
                parts = np.ascontiguousarray(values).view(kind)
                for word, write in enumerate(writers):
                    whole = np.zeros(LANES, kind)
                    whole[mask] = parts[:, word]
                    write(fiber.warp, mask, whole)
                block.launch.counts[f"ld.{space}"] += 1
            fiber.pc += 1

        return run

    def _st(self, pc, instruction):
        space, words, kind = self._memory(instruction)
        names = [n.strip() for n in instruction.operands[1].strip("{} ").split(",")]
        size = np.dtype(kind).itemsize
        read = [self.reader(n, UNSIGNED[size]) for n in names]
        assert len(read) == words, instruction
        address, guard = (
            self.address(instruction.operands[0], space),
            self.guarded(instruction),
        )

        def run(block, fiber):
            mask = guard(block, fiber)
            if mask is None:
                mask = ALL
            if mask.any():
                at = address(block, fiber.warp)[mask]
                values = np.stack([r(block, fiber.warp)[mask] for r in read], 1)
                values = np.ascontiguousarray(values).view(np.uint8)
                block.store(space, pc, fiber.warp, mask, at, values)
                block.launch.counts[f"st.{space}"] += 1
            fiber.pc += 1

        return run

    # arithmetic

    def _mov(self, pc, instruction):
        """Also packs {low, high} into one register and takes one apart."""
        target, source = instruction.operands
        if "{" not in target + source:
            return self._arithmetic(pc, instruction)
        whole = _dtype(instruction.opcode[-1])
        names = [
            n.strip()
            for n in (target + source).partition("{")[2].partition("}")[0].split(",")
        ]
        part = UNSIGNED[np.dtype(whole).itemsize // len(names)]
        guard = self.guarded(instruction)
        if "{" in source:
            read, write = [self.reader(n, part) for n in names], self.writer(target)

            def run_pack(block, fiber):
                parts = np.stack([r(block, fiber.warp) for r in read], 1)
                packed = np.ascontiguousarray(parts).view(whole).ravel()
                write(fiber.warp, guard(block, fiber), packed)
                fiber.pc += 1

            return run_pack
        read_whole = self.reader(source, whole)
        writers = [None if n == "_" else self.writer(n) for n in names]

        def run_unpack(block, fiber):
            parts = (
                np.ascontiguousarray(read_whole(block, fiber.warp))
                .view(part)
                .reshape(LANES, -1)
            )
            for i, write in enumerate(writers):
                if write:
                    write(fiber.warp, guard(block, fiber), parts[:, i].copy())
            fiber.pc += 1

        return run_unpack

    def _arithmetic(self, pc, instruction):
        compute, kinds = self._operation(instruction)
        write = self.writer(instruction.operands[0])
        readers = [
            self.reader(o, k)
            for o, k in zip(instruction.operands[1:], kinds, strict=True)
        ]
        guard = self.guarded(instruction)

        def run(block, fiber):
            warp = fiber.warp
            write(
                warp,
                guard(block, fiber),
                compute(*[read(block, warp) for read in readers]),
            )
            fiber.pc += 1

        return run

    def _operation(self, instruction) -> tuple[Callable, list[type]]:
        """The function of an opcode and what it reads its operands as."""
        name, *modifiers = instruction.opcode
        last = modifiers[-1] if modifiers else ""
        kind = (
            bool
            if last == "pred"
            else _dtype(last)
            if re.fullmatch(r"[busf]\d+", last)
            else None
        )
        if last.startswith("f") or kind is None:
            raise NotImplementedError(".".join(instruction.opcode))
        middle = modifiers[0] if len(modifiers) > 1 else ""
        if name in ("mov", "cvta"):
            return (lambda a: a), [kind]
        if name in ("add", "sub") and len(modifiers) == 1:
            return (np.add if name == "add" else np.subtract), [kind, kind]
        if name in ("min", "max"):
            return (np.minimum if name == "min" else np.maximum), [kind, kind]
        if name in _BITS:
            return _BITS[name], [kind, kind]
        if name == "not":
            return (np.logical_not if kind is bool else np.invert), [kind]
        if name == "neg":
            return np.negative, [kind]
        if name == "abs":
            return np.abs, [kind]
        if name in ("shl", "shr"):
            return _shift(name == "shl", kind), [kind, np.uint32]
        if name in ("mul", "mad"):
            more = [kind] if name == "mad" else []
            if middle == "lo":
                if name == "mul":
                    return np.multiply, [kind, kind]
                return (lambda a, b, c: a * b + c), [kind, kind, *more]
            wide = _wide(kind)
            if middle == "wide":
                if name == "mul":
                    return (lambda a, b: a.astype(wide) * b.astype(wide)), [kind, kind]
                return (lambda a, b, c: a.astype(wide) * b.astype(wide) + c), [
                    kind,
                    kind,
                    wide,
                ]
            if middle == "hi" and name == "mul" and np.dtype(kind).itemsize < 8:
                bits = wide(np.dtype(kind).itemsize * 8)
                return (
                    lambda a, b: ((a.astype(wide) * b.astype(wide)) >> bits).astype(
                        kind
                    )
                ), [
                    kind,
                    kind,
                ]
        if name == "setp" and len(modifiers) == 2:
            return _COMPARE[modifiers[0]], [kind, kind]
        if name == "selp":
            return (lambda a, b, p: np.where(p, a, b)), [kind, kind, bool]
        if name == "cvt" and len(modifiers) == 2:
            to = _dtype(modifiers[0])
            return (lambda a: a.astype(to)), [kind]
        if name == "bfe":
            return _extract(kind), [kind, np.uint32, np.uint32]
        if name == "prmt" and len(modifiers) == 1:
            return _permute, [np.uint32, np.uint32, np.uint32]
        if name == "popc":
            return (lambda a: np.bitwise_count(a).astype(np.uint32)), [kind]
        raise NotImplementedError(".".join(instruction.opcode))
