# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Asks `vllm-moe-prefetch plan --gpu` many questions."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ASK = """
import json, os, sys
from pathlib import Path
sys.argv = ["vllm-moe-prefetch", "plan", "--gpu", "4090"]
from vllm.plugins.moe_gpu_prefetch.command import gpu_elsewhere
GPUS = gpu_elsewhere.GPUS
gpu_elsewhere.pretend(gpu_elsewhere.gpu_called("4090"))
from vllm.plugins.moe_gpu_prefetch.command import main as command
place = Path(sys.stdin.readline().strip())
for number, arguments in enumerate(json.loads(sys.stdin.read())):
    if os.fork() == 0:
        for descriptor, name in ((1, "out"), (2, "err")):
            file = os.open(place / f"{number}.{name}", os.O_CREAT | os.O_WRONLY)
            os.dup2(file, descriptor)
        gpu = arguments.pop(0) if arguments and arguments[0] in GPUS else "RTX 4090"
        gpu_elsewhere.pretended = gpu_elsewhere.gpu_called(gpu)
        sys.argv = ["vllm-moe-prefetch", "plan", "--gpu", gpu, *arguments]
        command.main()
    status = os.waitstatus_to_exitcode(os.wait()[1])
    (place / f"{number}.status").write_text(str(status))
"""
"""Asks many questions of one process: importing vLLM for each takes seconds."""


class Answer(NamedTuple):
    status: int
    out: str
    err: str


def ask(questions: dict[str, list[str]], place: Path) -> dict[str, Answer]:
    """What `plan --gpu 4090 ARGUMENTS` answers, by the name of the question.

    Args:
        questions: arguments by name. The first one may name another GPU.
        place: where the answers are written.
    """
    subprocess.run(
        [sys.executable, "-c", ASK],
        input=f"{place}\n{json.dumps(list(questions.values()))}",
        text=True,
        check=True,
        timeout=600,
        env={**os.environ, "VLLM_CONFIGURE_LOGGING": "0"},
    )

    def answer(number: int) -> Answer:
        status, out, err = (
            place / f"{number}.{part}" for part in ("status", "out", "err")
        )
        return Answer(int(status.read_text()), out.read_text(), err.read_text())

    return {name: answer(number) for number, name in enumerate(questions)}
