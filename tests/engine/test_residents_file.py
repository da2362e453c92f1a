# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The residents' file: what is written is read back, and a file that cannot be used is
ignored with one line."""

import json
import logging
import os
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.decisions.test_manager import make_manager
from tests.support import wait_until
from vllm.model_executor.layers.fused_moe.expert_slots import warm_start
from vllm.model_executor.layers.fused_moe.expert_slots.counters import (
    DIRECTORY_VARIABLE,
)
from vllm.model_executor.layers.fused_moe.expert_slots.decisions.policy import (
    FREQUENCY_UNIT,
    Ranking,
)
from vllm.model_executor.layers.fused_moe.expert_slots.shared_store.trust import (
    make_place,
)
from vllm.model_executor.layers.fused_moe.expert_slots.warm_start import (
    MAX_BYTES,
    ResidentsFile,
    ResidentsKeeper,
)

IDENTITY = {"models": [{"model": "m", "rank": 0}]}
EXPERTS = 12


@pytest.fixture(autouse=True)
def counters_of_its_own(monkeypatch):
    """Managers of this module have no name; with a directory they would share a
    file."""
    monkeypatch.delenv(DIRECTORY_VARIABLE, raising=False)


@pytest.fixture
def place(tmp_path):
    place = tmp_path / "residents"
    make_place(place, "warm_start")
    return place


@pytest.fixture
def file(place):
    return ResidentsFile(place, IDENTITY)


def served(num_slots=4, policy="lru"):
    """A layer after some steps: the later an expert is asked for, the more often it
    was."""
    manager = make_manager(EXPERTS, num_slots, policy)
    for expert in (1, 7, 7, 3, 3, 3, 9, 9, 9, 9):
        manager.step(torch.tensor([[expert]]))
    return manager


def written(file, manager, layer="a"):
    file.write({layer: manager.ranking()}, {layer: manager})


def begun(file, num_slots=4, policy="lru", experts=EXPERTS):
    """A layer after a start with what the file holds."""
    manager = make_manager(experts, num_slots, policy)
    manager.step(torch.tensor([[2]]))
    manager.reset(file.read({"a": manager}).get("a"))
    for name, slots in manager.rows.slot_rows.items():
        assert torch.equal(slots, manager.store.tensors[name][manager.residency()])
    assert not manager.counters.steps and not manager.history.step
    return manager


def warnings_in(caplog):
    """A record that reached the handler by two loggers counts once."""
    records = {id(record): record for record in caplog.records}.values()
    return [
        record.getMessage() for record in records if record.levelno >= logging.WARNING
    ]


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_the_next_start_has_the_residents_and_their_order(file, policy, caplog_vllm):
    before = served(policy=policy)
    assert before.ranking().experts == [9, 3, 7, 1]
    written(file, before)
    with caplog_vllm.at_level(logging.INFO):
        after = begun(file, policy=policy)
    assert after.ranking() == before.ranking()
    assert sorted(before.residency()) == after.residency()
    assert (
        f"1 of 1 MoE layers are filled from {file.path}, written 20" in caplog_vllm.text
    )
    leaving = (
        [1, 7, 3] if policy == "lru" else [1]
    )  # then what entered is worth the least
    for gone, entering in zip(leaving, (5, 6, 8), strict=False):
        after.step(torch.tensor([[entering]]))
        assert gone not in after.residency()
    assert (
        file.path.stat().st_mode & 0o777 == 0o600
        and len(list(file.path.parent.iterdir())) == 1
    )


@pytest.mark.parametrize("policy", ["lru", "lfu"])
@pytest.mark.parametrize(
    ("num_slots", "experts"), [(2, [9, 3]), (6, [9, 3, 7, 1, 0, 2]), (11, None)]
)
def test_another_number_of_slots_and_another_policy(file, policy, num_slots, experts):
    """A smaller N takes the best, a larger one all and then the lowest ids that are
    missing."""
    written(file, served(policy="lru" if policy == "lfu" else "lfu"))
    found = begun(file, num_slots, policy).ranking()
    assert found.experts == (experts or [9, 3, 7, 1, 0, 2, 4, 5, 6, 8, 10])
    assert not any(found.counts)  # one of the two keeps none


def test_counts_stay_within_their_half_life():
    """A count that a longer half-life allowed is cut to the most that this one
    leaves."""
    manager = make_manager(EXPERTS, 2, "lfu", half_life=4)
    manager.reset(Ranking([3, 5], [1 << 40, 2 * FREQUENCY_UNIT]))
    assert manager.ranking().counts == [4 * FREQUENCY_UNIT, 2 * FREQUENCY_UNIT]
    for _ in range(4):
        manager.step(torch.tensor([[5]]))
    assert manager.ranking().experts == [5, 3]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, EXPERTS - 1), st.sampled_from(["lru", "lfu"]), st.data())
def test_any_residents_make_a_start(num_slots, policy, data):
    """The tables fit each other, the order is the one given, and steps go on from
    there."""
    residents = data.draw(st.lists(st.integers(0, EXPERTS - 1), unique=True))
    counts = sorted(
        data.draw(
            st.lists(st.integers(0, 1 << 61), min_size=EXPERTS, max_size=EXPERTS)
        ),
        reverse=True,
    )
    manager = make_manager(EXPERTS, num_slots, policy)
    manager.reset(Ranking(residents, counts[: len(residents)]))
    kept = residents[:num_slots]
    assert (
        manager.ranking().experts[: len(kept)] == kept
        and len(manager.residency()) == num_slots
    )
    assert abs(manager.history.values()).max() < 1 << 61
    for expert in data.draw(st.lists(st.integers(0, EXPERTS - 1), max_size=6)):
        manager.step(torch.tensor([[expert]]))
        assert expert in manager.residency()


def changed(**values):
    def change(path):
        content = json.loads(path.read_text())
        content["layers"]["a"].update(values)
        path.write_text(json.dumps(content))

    return change


def with_format(path):
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))


def of_another_model(path):
    content = json.loads(path.read_text())
    content["identity"]["models"][0]["model"] = "n"
    path.write_text(json.dumps(content))


def as_a_link(path):
    path.rename(path.with_name("there"))
    path.symlink_to("there")


def as_a_pipe(path):
    path.unlink()
    os.mkfifo(path, 0o600)


def as_a_directory(path):
    path.unlink()
    path.mkdir(0o700)


@pytest.mark.parametrize(
    ("damage", "reason"),
    {
        "truncated": (lambda path: os.truncate(path, 100), "it is damaged"),
        "empty": (lambda path: os.truncate(path, 0), "it is damaged"),
        "not JSON": (lambda path: path.write_bytes(b"\xff\x00"), "it is damaged"),
        "no object": (lambda path: path.write_text("[1, 2]"), "it is damaged"),
        "nested": (lambda path: path.write_text("[" * 100_000), "it is damaged"),
        "format": (with_format, "'format'"),
        "type": (changed(experts=["9", 3, 7, 1]), "'layers.a.experts.0'"),
        "negative": (changed(experts=[-1, 3, 7, 1]), "'layers.a.experts.0'"),
        "fraction": (changed(counts=[0.5, 0, 0, 0]), "'layers.a.counts.0'"),
        "huge": (changed(counts=[10**300, 0, 0, 0]), "'layers.a.counts.0'"),
        "lengths": (changed(counts=[1]), "4 experts and 1 counts"),
        "twice": (changed(experts=[3, 3, 7, 1]), "an expert is listed twice"),
        "out of range": (changed(experts=[12, 3, 7, 1]), "expert 12 of 12"),
        "unknown key": (changed(more=1), "'layers.a.more'"),
        "other experts": (changed(num_experts=16), "a has 12 experts, not 16"),
        "foreign": (of_another_model, "it belongs to another model or rank"),
        "large": (
            lambda path: os.truncate(path, MAX_BYTES + 1),
            "it has more than 16,777,216",
        ),
        "readable": (
            lambda path: path.chmod(0o644),
            "not a regular file that only this user can access",
        ),
        "link": (as_a_link, "not a regular file of this user"),
        "pipe": (as_a_pipe, "not a regular file that only this"),
        "directory": (as_a_directory, "not a regular file that only this"),
    }.values(),
)
def test_what_cannot_be_used_is_ignored_with_a_line(file, caplog_vllm, damage, reason):
    """One warning, which names the file and the reason; the slots start as without
    it."""
    written(file, served())
    damage(file.path)
    assert begun(file).residency() == [0, 1, 2, 3]
    (line,) = warnings_in(caplog_vllm)
    assert line.startswith(f"Warm start: {file.path} is ignored: ") and reason in line
    assert "\n" not in line and len(line) < 400


def test_no_file_yet_is_no_fault(file, caplog_vllm):
    with caplog_vllm.at_level(logging.INFO):
        assert begun(file).residency() == [0, 1, 2, 3]
    assert f"{file.path} does not exist yet" in caplog_vllm.text
    assert not warnings_in(caplog_vllm)


def test_a_layer_that_the_file_has_not_starts_as_without_it(file):
    written(file, served(), layer="another")
    assert begun(file).residency() == [0, 1, 2, 3]


def test_a_keeper_writes_while_the_engine_runs_and_at_the_end(file, monkeypatch):
    """A killed process leaves a file that is a few steps old. Without a step nothing is
    written, so an engine that served no request leaves the file as it was."""
    monkeypatch.setattr(warm_start, "IDLE_S", 0.05)
    manager = make_manager(EXPERTS, 4, "lru")
    keeper = ResidentsKeeper(file, {"a": manager})
    time.sleep(0.2)
    assert not file.path.exists()
    manager.step(torch.tensor([[6, 8]]))
    wait_until(file.path.exists)
    seen = file.path.stat().st_ino
    manager.step(torch.tensor([[10]]))
    wait_until(lambda: file.path.stat().st_ino != seen)
    assert begun(file).ranking().experts[0] == 10
    monkeypatch.setattr(warm_start, "IDLE_S", 1000)
    time.sleep(0.2)
    manager.step(torch.tensor([[11]]))
    keeper.close()
    assert begun(file).ranking() == manager.ranking()
    seen = file.path.stat().st_ino
    keeper.close()
    assert (
        file.path.stat().st_ino == seen and len(list(file.path.parent.iterdir())) == 1
    )
    assert not keeper._thread.is_alive()


def test_a_keeper_writes_under_load(file, monkeypatch):
    """Steps follow each other, so that it is never idle: it writes when the interval is
    over."""
    monkeypatch.setattr(warm_start, "IDLE_S", 0.1)
    monkeypatch.setattr(warm_start, "INTERVAL_S", 0.5)
    manager = make_manager(EXPERTS, 4, "lru")
    keeper, begin = ResidentsKeeper(file, {"a": manager}), time.monotonic()

    def step_and_look():
        manager.step(torch.tensor([[6, 8]]))
        return file.path.exists()

    wait_until(step_and_look)
    assert time.monotonic() - begin >= 0.5
    keeper.close()


def test_a_reading_within_a_step_is_dropped(file):
    """The tables are copied at any moment. If they do not fit each other, the last good
    copy of that layer is written; other layers are written as they are."""
    torn, whole = served(), served()
    keeper = ResidentsKeeper(file, {"a": torn, "b": whole})
    keeper.write()
    before = torn.ranking()
    for manager in (torn, whole):
        manager.step(torch.tensor([[5]]))
    torn.tables.slot_to_expert[0] = torn.tables.slot_to_expert[1]
    keeper.close()
    content = json.loads(file.path.read_text())
    assert content["layers"]["a"]["experts"] == before.experts
    assert (
        content["layers"]["b"]["experts"] == whole.ranking().experts != before.experts
    )


def test_what_cannot_be_written_is_said_and_the_end_goes_on(file, caplog_vllm):
    manager = served()
    keeper = ResidentsKeeper(file, {"a": manager})
    file.path.parent.rmdir()
    keeper.close()
    (line,) = warnings_in(caplog_vllm)
    assert line.startswith(f"Warm start: {file.path} was not written: ")
