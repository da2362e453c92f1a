# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
from collections.abc import Iterator

import pytest

from benchmarks.cpu import endurance
from tests.support.server import Server, start, stop, wait


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    """Slots, and stock. The last test to use them ends them."""
    work = tmp_path_factory.mktemp("endurance")
    model = endurance.checkpoint(work / "model")
    slots = ("--moe-gpu-prefetch", str(endurance.SLOTS))
    options = (*endurance.OPTIONS, "--shutdown-timeout", "120")
    pair = [
        start(model, work / f"{name}.log", *options, *added, **endurance.ENVIRONMENT)
        for name, added in (("slots", slots), ("stock", ()))
    ]
    try:
        for server in pair:
            wait(server)
        yield pair
    finally:
        for server in pair:
            stop(server)
