# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Starts `loading_engine.py`, for tests and benchmarks."""

import json
import subprocess
import sys
from typing import Any

from tests.support import ROOT


class EngineProcess:
    """Starts at once; `answer` waits for what it measured."""

    def __init__(self, *arguments: object):
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.support.loading_engine",
                *map(str, arguments),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        log = []
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
            log.append(line)
        raise RuntimeError("".join(log[-40:]))

    def memory(self) -> dict[str, int]:
        """Bytes of memory after a long prompt: `pss`, pages that are mapped several
        times by their share; `rss`, once for each mapping of this process."""
        assert self.process.stdin is not None
        self.process.stdin.write("pss\n")
        self.process.stdin.flush()
        return self.answer()

    def pss(self) -> int:
        return self.memory()["pss"]

    def end(self) -> None:
        self.process.communicate(timeout=300)
        assert self.process.returncode == 0

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()
