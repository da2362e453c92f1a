# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Engines on a shared store answer as stock does, and refuse a damaged store, an
incomplete checkpoint and a full directory."""

import os
import shutil
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

from tests.shared_store.test_store import flip
from tests.support.engine import assert_offloaded, moe_layers, run, start
from vllm.model_executor.layers.fused_moe.expert_slots.config import (
    MoEPrefetchConfig,
    MoEPrefetchError,
)
from vllm.model_executor.layers.fused_moe.expert_slots.shared_store.catalogue import (
    stores,
)
from vllm.plugins.moe_gpu_prefetch import start as start_up


@pytest.fixture
def place(tmp_path):
    return tmp_path / "stores"


@pytest.fixture(scope="module")
def stock(checkpoint):
    return run(checkpoint)


def test_a_changed_byte_is_found_before_it_is_served(checkpoint, stock, place):
    """The start fails, the store is removed, and the next start rebuilds it."""
    run(checkpoint, slots=8, shared_store=str(place))
    (data,) = place.glob("*/experts.bin")
    flip(data, data.stat().st_size // 2)
    with pytest.raises(
        MoEPrefetchError, match=r"have changed since they were written.*start again"
    ):
        start(checkpoint, slots=8, shared_store=str(place))
    assert stores(place) == []
    assert run(checkpoint, slots=8, shared_store=str(place)).outputs == stock.outputs


def test_engines_on_a_shared_store_equal_stock(checkpoint, stock, place, caplog_vllm):
    """One builds, one attaches with another N, policy and length; experts are
    offloaded."""
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
    """The same directory with other weights: another store is built, and answers are
    those of the new weights."""
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
    """It is refused as without a shared store, and no store is left."""
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    weights = load_file(model / "model.safetensors")
    del weights["model.layers.1.mlp.experts.3.up_proj.weight"]
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(MoEPrefetchError, match="incomplete"):
        start(model, slots=8, shared_store=str(place))
    assert stores(place) == []


def test_a_place_without_room_is_refused_before_loading(checkpoint, place, monkeypatch):
    """The size is known before a weight is read."""
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
    """A second server takes no memory for experts, so it is not refused for it."""
    llm = start(checkpoint, slots=8, shared_store=str(place))
    assert len(moe_layers(llm)) == 4
    del llm
    none_left = start_up.host_memory().__class__(64 << 30, 1 << 20)
    monkeypatch.setattr(start_up, "host_memory", lambda: none_left)
    with pytest.raises(MoEPrefetchError, match="must stay free"):
        start(checkpoint, slots=8)
    start(checkpoint, slots=8, shared_store=str(place))


def test_without_a_shared_store_the_checkpoint_is_not_looked_up(monkeypatch):
    """The look-up reads the Hugging Face cache."""
    monkeypatch.setattr(start_up, "checkpoint_directory", pytest.fail)
    asked = MoEPrefetchConfig(slots=8)
    assert not start_up._stores_present(SimpleNamespace(model_config=None), asked)
