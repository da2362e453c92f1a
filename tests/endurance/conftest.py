# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
from collections.abc import Iterator

import pytest

from benchmarks.cpu import endurance
from tests.support.server import Server, all_serving, start_pair


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    """Slots, and stock. The last test to use them ends them."""
    work = tmp_path_factory.mktemp("endurance")
    model = endurance.checkpoint(work / "model")
    options = (*endurance.OPTIONS, "--shutdown-timeout", "120")
    pair = start_pair(
        model, work, *options, slots=endurance.SLOTS, **endurance.ENVIRONMENT
    )
    with all_serving(pair):
        yield pair
