# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A trace of a small model, and the command that reads it."""

from pathlib import Path

import numpy as np
import pytest

from tests.support.command_line import moe_prefetch_here
from tests.support.traces import layer_of, write_trace

EXPERTS, MILLION = 16, 1_000_000


def recorded(name: str, seed: int, steps: int = 240, **others):
    """A layer of 16 experts, top-2: requests of a prompt of 30 tokens, which needs all
    experts, and 39 decode steps, which favour some."""
    random = np.random.default_rng(seed)
    odds = 1 / np.arange(1, EXPERTS + 1) ** 1.5
    order = random.permutation(EXPERTS)
    sets = [
        range(EXPERTS)
        if step % 40 == 0
        else order[random.choice(EXPERTS, 2, replace=False, p=odds / odds.sum())]
        for step in range(steps)
    ]
    tokens = [30 if step % 40 == 0 else 1 for step in range(steps)]
    given = {"top_k": 2, "routed": 2.0, "bytes_per_expert": MILLION} | others
    return layer_of(sets, EXPERTS, 4, tokens, name=name, **given)


@pytest.fixture(scope="module")
def layers():
    return [recorded(f"layers.{number}", number) for number in range(3)]


@pytest.fixture
def trace(tmp_path, layers) -> Path:
    return write_trace(tmp_path / "a.trace", layers)


@pytest.fixture
def tune(monkeypatch, capsys):
    """Runs the command here; returns the status, standard output, and the error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        status = moe_prefetch_here(monkeypatch, "tune", *map(str, arguments))
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run
