# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Quantised experts in slots on the CPU platform: stock's loader, methods and kernels,
token ids and logprobs of stock bit for bit. The gates of stock's kernels that ask for
AMX are open in both arms (`support/without_amx.py`)."""

import gc
import math
from functools import cache

import pytest
import torch

from tests.support.engine import assert_offloaded, run, start
from tests.support.quantised import EXPERTS, HIDDEN, ON_CPU, WIDTH
from tests.support.quantised import make_quantised as make
from tests.support.without_amx import gates_open, kernel_is_here
from vllm.model_executor.layers.fused_moe.expert_slots.shared_store.catalogue import (
    stores,
)
from vllm.model_executor.layers.fused_moe.expert_slots.versions import VLLM_0_33
from vllm.plugins.moe_gpu_prefetch import start as start_up

pytestmark = pytest.mark.skipif(
    not kernel_is_here(), reason="this vLLM has no kernel of quantised experts"
)
COMPILED = {"enforce_eager": False, "compilation_config": {"mode": 3}}

_WEIGHTS, _OUTPUTS = 3 * HIDDEN * WIDTH, 2 * WIDTH + HIDDEN
_INT4 = _WEIGHTS // 128
PROCESSED = {
    "fp8-block": _WEIGHTS + _WEIGHTS // 128**2 * 4,
    "int8": _WEIGHTS + _OUTPUTS * 4 + _OUTPUTS * 4,  # column sums, and scales
    # Tiles of 32 x 128 values with 32 column sums; scales in float32, int8 zero points.
    **dict.fromkeys(("int4-ct", "gptq", "awq"), _INT4 * (64 + 4) + _INT4 * (4 + 1)),
    "mxfp4": _WEIGHTS // 2 + _WEIGHTS // 32 + _OUTPUTS * 4,  # biases in float32
}
"""Bytes of one expert after the CPU platform's processing."""


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory):
    home = tmp_path_factory.mktemp("quantised")
    return lambda name: make(home / name, name)


@pytest.fixture(scope="module")
def stock_of(checkpoint_of):
    """Stock's answers, asked once."""

    @cache
    def stock(name: str, compiled: bool):
        with gates_open():
            outputs = run(checkpoint_of(name), **(COMPILED if compiled else {})).outputs
        for _, logprobs in outputs:
            assert all(math.isfinite(p) for step in logprobs for p in step.values())
        assert len({token for tokens, _ in outputs for token in tokens}) > 5
        return outputs

    return stock


@pytest.fixture
def planned(monkeypatch):
    """What was measured before each start."""
    measured, measure = [], start_up.measure

    def seen(*args, **kwargs):
        measured.append(measure(*args, **kwargs))
        return measured[-1]

    monkeypatch.setattr(start_up, "measure", seen)
    return measured


def assert_in_slots(slotted, name, slots):
    """Stock's quantised kernel ran on rows of the format's size."""
    assert_offloaded(slotted.layers, slots, EXPERTS)
    for layer in slotted.layers:
        kernel = layer.quant_method.moe_kernel.fused_experts
        assert type(kernel).__name__.startswith("SlottedCPUExperts")
        assert layer.slot_manager.store.bytes_per_expert == PROCESSED[name]


def rows_of(layer):
    tensors = layer.slot_manager.rows.tensors.items()
    return {name: tensor[0].nbytes for name, tensor in tensors}


@pytest.mark.parametrize("name", ON_CPU)
def test_outputs_equal_stock_and_a_shared_store_is_attached(
    checkpoint_of, stock_of, planned, tmp_path, name
):
    """One engine builds a shared store, another attaches it with as few slots as the
    router allows and reads no expert; both overflow. The plan knew the bytes of an
    expert as it is processed."""
    stock, place = stock_of(name, False), tmp_path / "stores"
    for slots in (EXPERTS // 4, 4 if name == "mxfp4" else 2):
        with gates_open():
            slotted = run(checkpoint_of(name), slots=slots, shared_store=str(place))
        assert slotted.outputs == stock
        assert_in_slots(slotted, name, slots)
        assert slotted.total("overflow_steps") > 0
        (footprint,) = planned[-1].footprints
        assert planned[-1].objection is None
        for layer, expected in zip(slotted.layers, footprint.layers, strict=True):
            assert rows_of(layer) == dict(expected.rows)
    assert [store.state for store in stores(place)] == ["complete"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("slots", [4, 8, EXPERTS - 1])
@pytest.mark.parametrize("name", ON_CPU)
def test_outputs_equal_stock(checkpoint_of, stock_of, name, slots, compiled):
    if compiled and VLLM_0_33:
        pytest.skip("0.33 over the compiled code of 0.32: stock is not traced")
    stock = stock_of(name, compiled)
    with gates_open():
        slotted = run(
            checkpoint_of(name), slots=slots, **(COMPILED if compiled else {})
        )
    assert slotted.outputs == stock
    assert_in_slots(slotted, name, slots)
    torch._dynamo.reset()
    del slotted
    gc.collect()


def test_compiled_outputs_equal_stock(checkpoint_of, stock_of):
    test_outputs_equal_stock(checkpoint_of, stock_of, "gptq", 4, True)


@pytest.mark.skipif(torch.cpu._is_amx_tile_supported(), reason="this CPU has AMX")
def test_the_product_opens_no_gate(checkpoint_of, monkeypatch):
    """Without AMX stock has no kernel, and what it says reaches the user."""
    with pytest.raises(NotImplementedError, match="No WNA16 MoE backend supports"):
        start(checkpoint_of("gptq"), slots=4)
