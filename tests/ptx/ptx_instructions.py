# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""PTX read and turned into what `ptxsim` runs: each instruction a function of (block,
fiber)."""

import re

from tests.ptx.ptx_arithmetic import Arithmetic
from tests.ptx.ptx_memory import MemoryAccess
from tests.ptx.ptxsim import Instruction, Program

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


class _Compiler(MemoryAccess, Arithmetic):
    """Turns each instruction into a function of (block, fiber)."""

    def compile(self) -> None:
        for pc, instruction in enumerate(self.program.instructions):
            family = instruction.opcode[0].partition("__")[0]
            make = getattr(self, f"_{family}", None) or self._arithmetic
            self.program.actions.append(make(pc, instruction))
        self.program.actions.append(self._ret(len(self.program.actions), None))
