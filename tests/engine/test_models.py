# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Models that bring their own layer classes get slots too; what cannot get them is
refused."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

from tests.support.engine import assert_offloaded, run, start
from tests.support.sample import make_dbrx, make_dense, make_gpt_oss
from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def assert_equal_from_slots(checkpoint, slots, experts, class_name, **arguments):
    stock = run(checkpoint, **arguments)
    slotted = run(checkpoint, slots=slots, **arguments)
    assert_offloaded(slotted.layers, slots, experts)
    assert {type(layer).__name__ for layer in slotted.layers} == {class_name}
    assert slotted.outputs == stock.outputs


def test_gpt_oss(directory):
    """Its own RoutedExperts class, biases per expert, and a loader that fills
    parameters itself."""
    checkpoint = make_gpt_oss(directory / "gpt-oss")
    assert_equal_from_slots(
        checkpoint, 6, 16, "SlottedGptOssRoutedExperts", dtype="bfloat16"
    )


def test_dbrx(directory):
    """Its own RoutedExperts class. With dummy weights: vLLM 0.32 cannot load a dbrx
    checkpoint."""
    checkpoint = make_dbrx(directory / "dbrx")
    assert_equal_from_slots(
        checkpoint, 6, 16, "SlottedDbrxExperts", load_format="dummy"
    )


def test_transformers_backend_routing_in_vllm(checkpoint):
    """Its own RoutedExperts class under stock's runner."""
    assert_equal_from_slots(
        checkpoint, 8, 32, "SlottedTransformersRoutedExperts", model_impl="transformers"
    )


def test_transformers_backend_routing_in_transformers(checkpoint, monkeypatch):
    """Its own RoutedExperts class under its own runner, which routes before vLLM sees
    the rows."""
    from vllm.model_executor.models.transformers.moe import MoEBlockFuser

    monkeypatch.setattr(MoEBlockFuser, "match", lambda *args: None)
    assert_equal_from_slots(
        checkpoint, 8, 32, "SlottedTransformersRoutedExperts", model_impl="transformers"
    )


def test_a_layer_that_slips_past_the_slots_is_refused_by_name(checkpoint, monkeypatch):
    """Never silently off: a layer class that the slots do not reach stops the start."""
    from vllm.model_executor.layers.fused_moe.expert_slots.refusals import models

    monkeypatch.setattr(models, "ExpertSlotsMixin", type("Another", (), {}))
    with pytest.raises(
        MoEPrefetchError, match=r"4 of 4 MoE layers of Qwen3MoeForCausalLM"
    ):
        start(checkpoint, slots=8)


@pytest.mark.parametrize("slots", [8, "auto"])
def test_a_dense_model_is_served_as_by_stock_and_said_so_once(
    directory, caplog_vllm, slots
):
    """There is nothing to put into slots: one line, no error."""
    slotted = run(make_dense(directory / "dense"), slots=slots)
    assert slotted.layers == [] and slotted.counters == {}
    lines = [
        r for r in caplog_vllm.messages if f"--moe-gpu-prefetch {slots} is ignored" in r
    ]
    assert len(lines) == 1


def test_raising_and_full_residency_are_said_once(checkpoint, caplog_vllm):
    """One line each, not one a layer."""
    from vllm.logger import _print_info_once, _print_warning_once

    _print_info_once.cache_clear()
    _print_warning_once.cache_clear()
    start(checkpoint, slots=2)
    start(checkpoint, slots=40)
    assert sum("raised to 4 slots per layer" in m for m in caplog_vllm.messages) == 1
    assert sum("full residency" in m for m in caplog_vllm.messages) == 1


def test_the_start_up_line_says_what_was_decided(checkpoint, caplog_vllm):
    """Experts, slots, bytes on both sides and how many sequences stay resident, in one
    line."""
    start(checkpoint, slots=8)
    (line,) = [m for m in caplog_vllm.messages if m.startswith("Expert slots:")]
    assert "4 MoE layers, 32 experts top-4, 8 slots each (lfu)" in line
    assert "49152 bytes per expert. About 2 concurrent sequences" in line
    assert line.endswith("UnquantizedExperts.") and "The kernel is " in line


@pytest.mark.parametrize(
    "missing", ["experts.7.up_proj", "experts.7.down_proj", "experts."]
)
def test_a_checkpoint_without_an_expert_tensor_is_refused(
    directory, checkpoint, missing
):
    """Stock would serve whatever the memory held; the message names layer and
    expert."""
    broken = directory / f"broken-{missing.strip('.')}"
    shutil.copytree(checkpoint, broken)
    (weights,) = broken.glob("*.safetensors")
    tensors = load_file(weights)
    kept = {n: t for n, t in tensors.items() if f"layers.2.mlp.{missing}" not in n}
    assert len(kept) < len(tensors)
    save_file(kept, weights, {"format": "pt"})
    with pytest.raises(
        MoEPrefetchError, match=r"incomplete: model\.layers\.2\.mlp\.experts"
    ):
        start(broken, slots=8)
