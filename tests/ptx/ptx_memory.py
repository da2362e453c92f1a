# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""PTX instructions that load and store."""

import re

import numpy as np

from tests.ptx.ptx_control import Control
from tests.ptx.ptx_operands import dtype_of
from tests.ptx.ptx_state import ALL, LANE, LANES, UNSIGNED, SimulationError


class MemoryAccess(Control):
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
        return space or "local", words, dtype_of(instruction.opcode[-1])

    def _ld(self, pc, instruction):
        if "param" in instruction.opcode:
            write, kind = (
                self.writer(instruction.operands[0]),
                dtype_of(instruction.opcode[-1]),
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
