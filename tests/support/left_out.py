# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Test modules that cannot run in this process are reported as skipped, with the
reason, and not left out without a word."""

from collections.abc import Iterator
from pathlib import Path

import pytest


class LeftOut(pytest.Module):
    """A test module that is never imported.

    Attributes:
        reason: why not, and the command that runs it.
    """

    reason = ""

    def collect(self) -> Iterator[pytest.Item]:
        pytest.skip(self.reason, allow_module_level=True)


def left_out(parent: pytest.Collector, path: Path, reason: str) -> LeftOut:
    """What `pytest_pycollect_makemodule` returns for a module that is not to run."""
    module = LeftOut.from_parent(parent, path=path)
    module.reason = reason
    return module
