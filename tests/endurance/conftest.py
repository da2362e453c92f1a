# SPDX-License-Identifier: Apache-2.0
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from server import Server, start, stop, wait

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import endurance


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
