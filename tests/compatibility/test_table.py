# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""docs/compatibility.md has no row without a test, and no test of the matrix without a
row."""

import re

import pytest

from tests.support import ROOT
from tests.support.architectures import ARCHITECTURES
from tests.support.named_tests import is_there
from vllm.model_executor.layers.fused_moe.expert_slots.refusals.arguments import (
    CONFLICTS,
)

PAGE = (ROOT / "docs" / "compatibility.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if line.startswith("|")
    and not line.startswith("|--")
    and "below `tests/`" not in line
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:50])
def test_the_row_has_its_test(row):
    """The last cell names a test that is there."""
    name = re.fullmatch(r"`([\w/]+\.py::test_\w+)`", row[-1])
    assert name and is_there(name[1]), row


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
