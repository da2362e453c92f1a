# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Loading a checkpoint of over 2 GiB takes little more memory than it keeps; two
servers and a second start share one store. Real engines, each in a process of its
own."""

import os
import shutil
import time
from pathlib import Path

import pytest

from tests.support.engine_process import EngineProcess
from tests.support.sample import make_large
from vllm.model_executor.layers.fused_moe.expert_slots.shared_store.catalogue import (
    stores,
)

EXPERT_BYTES = 12 * 64 * 3 * 768 * 768 * 2


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return make_large(tmp_path_factory.mktemp("large") / "qwen3-moe")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Shared memory where there is enough of it, else a directory."""
    status = os.statvfs("/dev/shm")
    if status.f_bavail * status.f_frsize > 3 * EXPERT_BYTES:
        directory = Path(f"/dev/shm/vllm-expert-stores-test-{os.getpid()}")
    else:
        directory = tmp_path_factory.mktemp("stores") / "place"
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def unshared(large):
    """What an engine with a store of its own measured."""
    engine = EngineProcess(large, 2)
    answer = engine.answer() | {"pss": engine.pss()}
    engine.end()
    return answer


def test_loading_takes_little_more_than_it_keeps(unshared):
    """Peak memory while loading, slots included: at most 1.15 of store and other
    weights."""
    assert unshared["store_bytes"] == EXPERT_BYTES > 2 << 30
    kept = unshared["store_bytes"] + unshared["other_bytes"]
    assert unshared["peak_bytes"] <= 1.15 * kept


def test_an_engine_takes_its_slots_and_staging_once(large):
    """Twelve layers of 64 experts at N = 16: L * N + (E - N) experts beside the store,
    where L * E have rows. What staging rows take is counted once, however many layers
    map it."""
    engine = EngineProcess(large, 16)
    answer, memory = engine.answer(), engine.memory()
    engine.end()
    expert = EXPERT_BYTES // (12 * 64)
    assert answer["row_bytes"] == pytest.approx((12 * 16 + 48) * expert, rel=0.01)
    kept = answer["store_bytes"] + answer["row_bytes"] + answer["other_bytes"]
    grown = memory["pss"] - answer["pss_before"]
    assert 0.95 * kept < grown < kept + 0.1 * EXPERT_BYTES
    assert memory["rss"] - memory["pss"] > 0.8 * 11 * 48 * expert


def test_a_killed_build_and_two_engines_on_one_store(large, place, unshared):
    """An engine killed while it builds leaves nothing that is served: the next one
    builds anew. A third attaches the store, loads no expert, gives the same outputs;
    together they need at most 1.25 of one engine's memory."""
    killed = EngineProcess(large, 2, place)
    while not any(
        data.stat().st_size > EXPERT_BYTES // 2
        for data in place.glob("*.building/experts.bin")
    ):
        assert killed.process.poll() is None
        time.sleep(0.002)
    killed.kill()
    assert [store.state for store in stores(place)] == ["unfinished"]
    first = EngineProcess(large, 2, place)
    built = first.answer()
    (complete,) = stores(place)
    assert (complete.state, complete.num_bytes) == ("complete", EXPERT_BYTES)
    second = EngineProcess(large, 2, place)
    attached = second.answer()
    first.pss()  # a page counts by its share once both have read it
    together = second.pss() + first.pss()
    assert together <= 1.25 * unshared["pss"]
    for answer in (built, attached):
        kept = answer["store_bytes"] + answer["other_bytes"]
        assert answer["peak_bytes"] <= 1.15 * kept
    assert built["outputs"] == attached["outputs"] == unshared["outputs"]
    assert attached["expert_bytes_read"] == 0 < built["expert_bytes_read"]
    for engine in (first, second):
        engine.end()
