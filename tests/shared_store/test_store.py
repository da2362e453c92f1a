# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A shared store is complete and correct, or it is not used, whichever process is
killed and whatever is changed on disk."""

import multiprocessing
import os
import signal
import time
from multiprocessing import forkserver

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support import ROOT, python_path, store_process
from tests.support.command_line import moe_prefetch_here
from tests.support.store_process import LAYERS, attach, build_slowly, tensors_of
from vllm.model_executor.layers.fused_moe.expert_slots.config import (
    MoEPrefetchError,
)
from vllm.model_executor.layers.fused_moe.expert_slots.shared_store import (
    store as shared_store,
)
from vllm.model_executor.layers.fused_moe.expert_slots.shared_store.catalogue import (
    remove,
    stores,
)
from vllm.model_executor.layers.fused_moe.expert_slots.shared_store.format import key_of
from vllm.model_executor.layers.fused_moe.expert_slots.shared_store.trust import (
    make_place,
)

IDENTITY = {"model": "m", "rank": 0}
KEY = key_of(IDENTITY)


@pytest.fixture(scope="module")
def processes():
    """Makes processes that have imported the store's module, and nothing of this one's
    threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([store_process.__name__])
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("PYTHONPATH", python_path(ROOT))
    forkserver.ensure_running()
    monkeypatch.undo()
    return context


@pytest.fixture
def place(tmp_path):
    return tmp_path / "stores"


def build(place, identity=IDENTITY):
    with shared_store.shared_store(place, identity) as store:
        assert not store.ready
        return {layer: store.add(layer, tensors_of(layer)) for layer in LAYERS}


def ready(place, identity=IDENTITY):
    with shared_store.shared_store(place, identity) as store:
        return store.ready


def assert_right(found):
    for layer in LAYERS:
        for name, tensor in tensors_of(layer).items():
            assert torch.equal(found[layer][name], tensor)
            assert found[layer][name].data_ptr() % 4096 == 0


def test_what_is_built_is_what_is_attached(place):
    """Builder and later processes see the same tensors. Only the owner can access the
    files."""
    assert_right(build(place))
    with shared_store.shared_store(place, IDENTITY) as store:
        assert store.ready
        assert_right({layer: store.attach(layer) for layer in LAYERS})
    assert place.stat().st_mode & 0o777 == 0o700
    for path in place.rglob("*"):
        assert path.stat().st_mode & 0o077 == 0


def test_another_identity_is_another_store(place):
    """A store is found by checkpoint, layout and versions together."""
    build(place)
    build(place, IDENTITY | {"rank": 1})
    assert len(stores(place)) == 2


def test_mapped_experts_cannot_be_written(processes, place):
    """A write ends the process instead of changing what all servers read."""
    build(place)
    process = processes.Process(target=attach, args=(place, IDENTITY, True))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGSEGV
    assert ready(place)


def test_a_failed_load_leaves_nothing(place):
    """An error while loading, a full place included, makes no store."""
    with (
        pytest.raises(RuntimeError, match="checkpoint"),
        shared_store.shared_store(place, IDENTITY) as store,
    ):
        store.add("a", tensors_of("a"))
        raise RuntimeError("checkpoint is damaged")
    assert stores(place) == [] and not any(place.glob("*.building"))


def test_a_full_place_is_said(place, monkeypatch):
    """The message says how far it got, and how to get more room."""

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with (
        pytest.raises(MoEPrefetchError, match=r"No space left .*--shm-size"),
        shared_store.shared_store(place, IDENTITY) as store,
    ):
        store.add("a", tensors_of("a"))


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(moment=st.floats(0, 0.14))
def test_kill_9_at_any_moment_of_the_build(processes, tmp_path_factory, moment):
    """The next builder removes what is left, unless it is complete. Nothing else is
    used."""
    place = tmp_path_factory.mktemp("killed") / "stores"
    started = processes.Event()
    process = processes.Process(target=build_slowly, args=(place, IDENTITY, started))
    process.start()
    started.wait()
    time.sleep(moment)
    process.kill()
    process.join()
    with shared_store.shared_store(place, IDENTITY) as store:
        add = (lambda layer: store.attach(layer)) if store.ready else None
        assert_right(
            {
                layer: add(layer) if add else store.add(layer, tensors_of(layer))
                for layer in LAYERS
            }
        )
    assert [listing.state for listing in stores(place)] == ["complete"]


def test_others_wait_for_the_builder_and_build_nothing(processes, place):
    """Four processes at once: one builds, the others attach what it built."""
    answers = processes.SimpleQueue()
    started = processes.Event()
    builders = [
        processes.Process(target=build_slowly, args=(place, IDENTITY, started, answers))
        for _ in range(4)
    ]
    for process in builders:
        process.start()
    for process in builders:
        process.join()
        assert process.exitcode == 0
    assert sorted(answers.get() for _ in builders) == ["attached"] * 3 + ["built"]


DAMAGES = {
    "truncated": lambda store: os.truncate(store / "experts.bin", 65536),
    "longer": lambda store: os.truncate(store / "experts.bin", 1 << 20),
    "empty": lambda store: os.truncate(store / "experts.bin", 0),
    "manifest": lambda store: flip(store / "manifest.json", 30),
    "no manifest": lambda store: (store / "manifest.json").unlink(),
    "no data": lambda store: (store / "experts.bin").unlink(),
}


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_the_store_rebuilt(place, damage, caplog_vllm):
    """It is never used: it is logged, removed and built again."""
    build(place)
    DAMAGES[damage](place / KEY)
    assert_right(build(place))
    assert f"{KEY} is rebuilt" in caplog_vllm.text
    assert ready(place)


def test_a_store_of_another_model_under_this_name_is_rebuilt(place):
    """A user renamed it, say. The manifest holds its identity."""
    other = IDENTITY | {"model": "other"}
    build(place, other)
    (place / key_of(other)).rename(place / KEY)
    assert_right(build(place))


def link(path):
    moved = path.with_name("elsewhere")
    path.rename(moved)
    path.symlink_to(moved)


FOREIGN = {
    "store is a link": lambda place: link(place / KEY),
    "data is a link": lambda place: link(place / KEY / "experts.bin"),
    "manifest is a link": lambda place: link(place / KEY / "manifest.json"),
    "lock is a link": lambda place: link(place / f"{KEY}.lock"),
    "data is open to others": lambda place: (place / KEY / "experts.bin").chmod(0o644),
    "store is open to others": lambda place: (place / KEY).chmod(0o755),
    "place can be written by others": lambda place: place.chmod(0o777),
}


@pytest.mark.parametrize("foreign", FOREIGN)
def test_what_others_could_have_made_is_refused(place, foreign):
    """It is not removed and links are not followed. The message names it."""
    build(place)
    FOREIGN[foreign](place)
    with pytest.raises(
        MoEPrefetchError, match=r"shared_store: .* Name a directory of your own"
    ):
        ready(place)


@pytest.mark.parametrize(
    ("owner", "mode", "reason"),
    [
        ("other", 0o1777, "belongs to user"),
        ("other", 0o700, "belongs to user"),
        ("root", 0o755, "belongs to user 0"),
        ("root", 0o1777, None),
        ("own", 0o1777, None),
        ("own", 0o700, None),
        ("own", 0o770, "can be written by others"),
    ],
)
def test_the_owner_of_a_place(place, monkeypatch, owner, mode, reason):
    """A sticky directory keeps other users from the files in it, but not its owner."""
    place.mkdir()
    place.chmod(mode)
    found = place.stat()
    uid = {"own": os.geteuid(), "root": 0, "other": 4321}[owner]
    if owner == "root":
        monkeypatch.setattr(os, "geteuid", lambda: 4321)
    status = os.stat_result([*found[:4], uid, *found[5:]])
    monkeypatch.setattr(type(place), "stat", lambda self, **_: status)
    if reason is None:
        make_place(place)
    else:
        with pytest.raises(MoEPrefetchError, match=reason):
            make_place(place)


def test_a_place_that_is_no_directory_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MoEPrefetchError, match="cannot be made: File exists"):
        ready(tmp_path / "file")


def test_the_command_lists_and_removes(place, monkeypatch, capsys):
    """A store in use stays. A removed one is built again. Other files are not
    touched."""
    build(place)
    (place / "mine.txt").write_text("keep")
    assert moe_prefetch_here(monkeypatch, "stores", str(place)) == 0
    assert f"{KEY}  complete" in capsys.readouterr().out
    with shared_store.shared_store(place, IDENTITY) as store:
        mapped = {layer: store.attach(layer) for layer in LAYERS}
        assert remove(place, []) == []
        assert [listing.state for listing in stores(place)] == ["in use"]
    assert moe_prefetch_here(monkeypatch, "stores", str(place), "--remove") == 0
    assert f"removed {KEY}" in capsys.readouterr().out
    assert [path.name for path in place.iterdir()] == ["mine.txt"]
    assert_right(mapped)  # a server keeps what it attached
    assert moe_prefetch_here(monkeypatch, "stores", str(place), "--remove", "../x") == 2
    assert "is not the key of a store" in capsys.readouterr().err
    assert moe_prefetch_here(monkeypatch, "stores", str(place / "none")) == 2
    assert_right(build(place))
