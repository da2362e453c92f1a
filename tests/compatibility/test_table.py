# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""docs/compatibility.md has no row without a test, and no test of the matrix without a
row."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.support.architectures import ARCHITECTURES
from vllm.model_executor.layers.fused_moe.expert_slots.refusals.arguments import (
    CONFLICTS,
)

TESTS = Path(__file__).resolve().parents[1]
PAGE = (TESTS.parent / "docs" / "compatibility.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if line.startswith("|")
    and not line.startswith("|--")
    and "below `tests/`" not in line
]


@cache
def names_in(file: Path) -> set[str]:
    tree = ast.parse(file.read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:50])
def test_the_row_has_its_test(row):
    """The last cell names a test that is there."""
    name = re.fullmatch(r"`([\w/]+\.py)::(test_\w+)`", row[-1])
    assert name, row
    assert name[2] in names_in(TESTS / name[1])


def test_every_architecture_has_its_row():
    """And the row says what the test says."""
    said = {row[0].partition(" ")[0]: row[1] for row in ROWS}
    for architecture in ARCHITECTURES:
        if architecture.stock_error:
            assert (
                said[architecture.name]
                == f"stock 0.32 ends: `{architecture.stock_error}`"
            )
        else:
            assert said[architecture.name].startswith("exact")


def test_every_conflict_has_its_row():
    """And the row says that it is refused."""
    for conflict in CONFLICTS:
        option = conflict.option.split(" ")[0]
        assert any(option in row[0] and "refused" in row[1] for row in ROWS), option
