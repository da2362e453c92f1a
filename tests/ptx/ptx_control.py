# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""PTX instructions of control, and those between the lanes of a warp."""

import numpy as np

from tests.ptx.ptx_operands import Operands, dtype_of
from tests.ptx.ptx_state import LANE, LANES

_BITS = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
_REDUCE = {"add": np.add, "min": np.minimum, "max": np.maximum, **_BITS}


class Control(Operands):
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
        read = self.reader(instruction.operands[1], dtype_of(kind))
        write = self.writer(instruction.operands[0])

        def do(block, warp, mask):
            total = _REDUCE[operation].reduce(
                read(block, warp)[mask], dtype=dtype_of(kind)
            )
            write(warp, mask, np.full(LANES, total, dtype_of(kind)))

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
