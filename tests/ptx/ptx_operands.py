# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Operands of PTX instructions: functions that read and write them."""

from collections.abc import Callable

import numpy as np

from tests.ptx.ptx_state import (
    LANE,
    LANES,
    LOCAL_BASE,
    SHARED_BASE,
    SIGNED,
    UNSIGNED,
    Array,
)
from tests.ptx.ptxsim import Block, Fiber, Instruction, Program, Warp


def dtype_of(name: str) -> type:
    """`s32` -> int32; `b`, `u` -> unsigned."""
    width = int(name[1:]) // 8
    return SIGNED[width] if name[0] == "s" else UNSIGNED[width]


class Operands:
    """Reads and writes the operands of a program's instructions."""

    def __init__(self, program: Program):
        self.program = program

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
