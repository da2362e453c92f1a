# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""PTX instructions that compute in registers."""

import re
from collections.abc import Callable

import numpy as np

from tests.ptx.ptx_operands import Operands, dtype_of
from tests.ptx.ptx_state import LANES, SIGNED, UNSIGNED, Array

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


class Arithmetic(Operands):
    def _mov(self, pc, instruction):
        """Also packs {low, high} into one register and takes one apart."""
        target, source = instruction.operands
        if "{" not in target + source:
            return self._arithmetic(pc, instruction)
        whole = dtype_of(instruction.opcode[-1])
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
            else dtype_of(last)
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
            to = dtype_of(modifiers[0])
            return (lambda a: a.astype(to)), [kind]
        if name == "bfe":
            return _extract(kind), [kind, np.uint32, np.uint32]
        if name == "prmt" and len(modifiers) == 1:
            return _permute, [np.uint32, np.uint32, np.uint32]
        if name == "popc":
            return (lambda a: np.bitwise_count(a).astype(np.uint32)), [kind]
        raise NotImplementedError(".".join(instruction.opcode))
