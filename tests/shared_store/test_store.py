# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A shared store is complete and right, or it is not served: whoever is killed or
tampers."""

import multiprocessing
import os
import signal
import time
from multiprocessing import forkserver

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.support import ROOT, store_process
from tests.support.command_line import moe_prefetch_here
from tests.support.engine import assert_offloaded, moe_layers, run, start
from tests.support.store_process import LAYERS, attach, build_slowly, tensors_of
from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError
from vllm.model_executor.layers.fused_moe.expert_slots.shared_store import (
    store as shared_store,
)
from vllm.model_executor.layers.fused_moe.expert_slots.shared_store.store import (
    key_of,
    remove,
    stores,
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
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
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
    """Builder and later processes see the same tensors; files are the owner's alone."""
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
    """How far it got, and how to get more room."""

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
    """Whatever is left is removed by the next builder, or was complete; nothing else is
    served."""
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
    everyone = [
        processes.Process(target=build_slowly, args=(place, IDENTITY, started, answers))
        for _ in range(4)
    ]
    for process in everyone:
        process.start()
    for process in everyone:
        process.join()
        assert process.exitcode == 0
    assert sorted(answers.get() for _ in everyone) == ["attached"] * 3 + ["built"]


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
    """Never served: said, removed, built again."""
    build(place)
    DAMAGES[damage](place / KEY)
    assert_right(build(place))
    assert f"{KEY} is rebuilt" in caplog_vllm.text
    assert ready(place)


def test_a_changed_byte_is_found_before_it_is_served(checkpoint, stock, place):
    """The start ends, the store is gone, and the next start builds it."""
    run(checkpoint, slots=8, shared_store=str(place))
    (data,) = place.glob("*/experts.bin")
    flip(data, data.stat().st_size // 2)
    with pytest.raises(MoEPrefetchError, match=r"are not those written.*start again"):
        start(checkpoint, slots=8, shared_store=str(place))
    assert stores(place) == []
    assert run(checkpoint, slots=8, shared_store=str(place)).outputs == stock.outputs


def test_a_store_of_another_model_under_this_name_is_rebuilt(place):
    """Renamed by hand, say: the manifest names its identity."""
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
    """Not removed and not followed: the user is told."""
    build(place)
    FOREIGN[foreign](place)
    with pytest.raises(
        MoEPrefetchError, match=r"shared_store: .* Name a directory of your own"
    ):
        ready(place)


def test_a_place_that_is_no_directory_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MoEPrefetchError, match="cannot be made: File exists"):
        ready(tmp_path / "file")


def test_the_command_lists_and_removes(place, monkeypatch, capsys):
    """What is in use stays; what was removed is built again; foreign files are not
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


@pytest.fixture(scope="module")
def stock(checkpoint):
    return run(checkpoint)


def test_engines_on_a_shared_store_equal_stock(checkpoint, stock, place, caplog_vllm):
    """The builder and the attached one, with another N, policy and length; offload
    happens."""
    for slots, policy, length, said in (
        (8, "lru", 512, "is complete"),
        (5, "lfu", 480, "attached"),
    ):
        slotted = run(
            checkpoint,
            slots=slots,
            policy=policy,
            max_model_len=length,
            shared_store=str(place),
        )
        assert slotted.outputs == stock.outputs
        assert_offloaded(slotted.layers, slots, 32)
        assert said in caplog_vllm.text
        caplog_vllm.clear()


def test_a_changed_checkpoint_is_another_store(checkpoint, place, tmp_path):
    """The same directory with other weights: built anew, and the answers are the new
    ones."""
    import shutil

    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    before = run(model, slots=8, shared_store=str(place))
    weights = load_file(model / "model.safetensors")
    changed = {name: w * 2 if "experts" in name else w for name, w in weights.items()}
    save_file(changed, model / "model.safetensors", {"format": "pt"})
    after = run(model, slots=8, shared_store=str(place))
    assert after.outputs == run(model).outputs != before.outputs
    assert len(stores(place)) == 2


def test_an_incomplete_checkpoint_makes_no_store(checkpoint, place, tmp_path):
    """Refused as without a shared store, and nothing is left to be served later."""
    import shutil

    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    weights = load_file(model / "model.safetensors")
    del weights["model.layers.1.mlp.experts.3.up_proj.weight"]
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(MoEPrefetchError, match="incomplete"):
        start(model, slots=8, shared_store=str(place))
    assert stores(place) == []


def test_a_place_without_room_is_refused_before_loading(checkpoint, place, monkeypatch):
    """The room is known before a weight is read."""
    real = os.statvfs

    def small(path):
        status = list(real(path))
        status[4] = 10  # f_bavail
        return os.statvfs_result(status)

    monkeypatch.setattr(os, "statvfs", small)
    with pytest.raises(
        MoEPrefetchError, match=r"has room for .*the experts take 6\.0 MiB"
    ):
        start(checkpoint, slots=8, shared_store=str(place))


def test_a_store_that_is_there_needs_no_more_host_memory(
    checkpoint, place, monkeypatch
):
    """A second server is not refused for memory that it will not take."""
    from vllm.plugins.moe_gpu_prefetch import start as start_up

    llm = start(checkpoint, slots=8, shared_store=str(place))
    assert len(moe_layers(llm)) == 4
    del llm
    none_left = start_up.host_memory().__class__(64 << 30, 1 << 20)
    monkeypatch.setattr(start_up, "host_memory", lambda: none_left)
    with pytest.raises(MoEPrefetchError, match="must stay free"):
        start(checkpoint, slots=8)
    start(checkpoint, slots=8, shared_store=str(place))
