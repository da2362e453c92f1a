# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""An expert of packed weights and scales is not served unless it is whole."""

from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQMoEMethod
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_wna16 import (  # noqa: E501
    CompressedTensorsWNA16MoEMethod,
)
from vllm.model_executor.layers.quantization.fp8 import Fp8MoEMethod

from tests.support.expert_loading import (
    EXPERTS,
    HIDDEN,
    WIDTH,
    assert_refused,
    load,
    make_layer,
)


def without_init(cls, **attributes):
    """A quantisation method of stock's whose kernel needs a GPU, for its
    create_weights."""

    def make(moe_config):
        method = cls.__new__(cls)
        method.moe, method.moe_quant_config, method.moe_kernel = moe_config, None, None
        vars(method).update(attributes)
        return method

    return make


def fp8(block):
    config = SimpleNamespace(activation_scheme="dynamic")
    name = "weight_scale_inv" if block else "weight_scale"
    return without_init(
        Fp8MoEMethod,
        quant_config=config,
        block_quant=bool(block),
        weight_block_size=block,
        moe_block_shape=block,
        weight_scale_refine=None,
        weight_scale_name=name,
    )


def gptq():
    config = SimpleNamespace(group_size=8, pack_factor=8)
    return without_init(AutoGPTQMoEMethod, quant_config=config, input_dtype=None)


def wna16():
    return without_init(
        CompressedTensorsWNA16MoEMethod,
        strategy="group",
        group_size=8,
        symmetric=True,
        packed_factor=Fraction(8),
    )


def packed(parts):
    """A checkpoint of a packed format.

    Args:
        parts: suffix of a tensor's name -> (dtype, shape of gate and up, shape of
            down).
    """
    tensors = {}
    for expert in range(EXPERTS):
        for suffix, (dtype, up, down) in parts.items():
            for part, shape in (
                ("gate_proj", up),
                ("up_proj", up),
                ("down_proj", down),
            ):
                tensors[f"{expert}.{part}.{suffix}"] = torch.ones(shape).to(dtype)
    return tensors


FP8, INT, F32 = torch.float8_e4m3fn, torch.int32, torch.float32
WEIGHT = {"weight": (FP8, (WIDTH, HIDDEN), (HIDDEN, WIDTH))}
PACKED: dict[str, tuple[Any, dict[str, Any]]] = {
    "fp8, a scale each": (fp8(None), WEIGHT | {"weight_scale": (F32, (), ())}),
    "fp8, a scale each in a list": (
        fp8(None),
        WEIGHT | {"weight_scale": (F32, (1,), (1,))},
    ),
    "fp8, a scale a block": (
        fp8([8, 8]),
        WEIGHT | {"weight_scale_inv": (F32, (3, 2), (2, 3))},
    ),
    "gptq": (
        gptq(),
        {
            "qweight": (INT, (HIDDEN // 8, WIDTH), (WIDTH // 8, HIDDEN)),
            "scales": (F32, (2, WIDTH), (3, HIDDEN)),
            "qzeros": (INT, (2, WIDTH // 8), (3, HIDDEN // 8)),
        },
    ),
    "compressed tensors": (
        wna16(),
        {
            "weight_packed": (INT, (WIDTH, HIDDEN // 8), (HIDDEN, WIDTH // 8)),
            "weight_scale": (F32, (WIDTH, 2), (HIDDEN, 3)),
            "weight_shape": (F32, (2,), (2,)),
        },
    ),
}


@pytest.mark.parametrize("name", PACKED)
def test_packed_formats_as_they_come(name):
    """What is whole is loaded, padded too. Their shapes are not known beforehand: an
    expert that got less than another is refused, whatever of it is missing or cut."""
    method, parts = PACKED[name]
    tensors = packed(parts)
    load(make_layer(method=method), tensors)
    if "fp8" in name:
        load(make_layer(method=method, padding=(8, 8)), tensors)
    for key in [key for key in tensors if key.startswith("2.")]:
        if "weight_shape" in key:
            continue  # No kernel reads it.
        rest = {n: t for n, t in tensors.items() if n != key}
        assert_refused(
            make_layer(method=method), rest, r"got \d+ of \d+ elements of expert 2\."
        )
        if tensors[key].dim() == 2:
            cut = tensors | {key: tensors[key][:-1]}
            assert_refused(make_layer(method=method), cut, r"elements of expert 2\.")
    for suffix in parts:
        required = suffix not in ("qzeros", "weight_shape")
        rest = {n: t for n, t in tensors.items() if not n.endswith(f".{suffix}")}
        if required:
            words = r"got 0 of \d+ elements of expert 0 and of 3 more"
            assert_refused(make_layer(method=method), rest, words)
