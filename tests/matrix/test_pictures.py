# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Models that see pictures give stock's token ids and logprobs from slots, with a
picture in the prompt, eager and compiled.

`make test` runs a few of them at a quarter of the experts, eager; `make test-all` all,
at every number of slots, eager and compiled.
"""

import gc
from functools import cache

import pytest
import torch
from PIL import Image

from tests.matrix.rows import COMPILED, assert_meaningful, rows_of
from tests.support.architectures import EXPERTS, SEEING, Seeing
from tests.support.engine import (
    PROMPTS,
    Outputs,
    answers,
    assert_offloaded,
    moe_layers,
    sampling,
    start,
)


def ask(architecture: Seeing, checkpoint, picture: Image.Image, **options):
    """The answers to a prompt with a picture and to two without, and the layers."""
    llm = start(
        checkpoint,
        limit_mm_per_prompt={"image": 1, "video": 0, "audio": 0},
        max_num_batched_tokens=256,
        **architecture.engine,
        **options,
    )
    prompts = [
        {
            "prompt": f"{architecture.picture}The picture shows",
            "multi_modal_data": {"image": picture},
        },
        *({"prompt": prompt} for prompt in PROMPTS[1:]),
    ]
    params = [sampling(8 + 8 * i) for i in range(len(prompts))]
    found = answers(llm.generate(prompts, params, use_tqdm=False)), moe_layers(llm)
    del llm
    gc.collect()
    return found


def mandelbrot(left: float) -> Image.Image:
    extent = (left, -1.5, left + 3, 1.5)
    return Image.effect_mandelbrot((96, 96), extent, 50).convert("RGB")


@pytest.fixture(scope="module")
def stock_of(checkpoint_of):
    """Stock's answers, asked once."""

    @cache
    def stock(architecture: Seeing, compiled: bool) -> Outputs:
        options = COMPILED if compiled else {}
        checkpoint = checkpoint_of(architecture)
        outputs, _ = ask(architecture, checkpoint, mandelbrot(-2), **options)
        assert_meaningful(outputs)
        return outputs

    return stock


@pytest.mark.parametrize(("architecture", "slots", "compiled"), rows_of(SEEING))
def test_outputs_equal_stock_with_a_picture(
    architecture, slots, compiled, checkpoint_of, stock_of
):
    """Token ids and logprobs are stock's; every MoE layer's experts were in slots."""
    options = COMPILED if compiled else {}
    checkpoint = checkpoint_of(architecture)
    stock = stock_of(architecture, compiled)
    outputs, layers = ask(
        architecture, checkpoint, mandelbrot(-2), slots=slots, **options
    )
    assert_offloaded(layers, slots, EXPERTS)
    assert len(layers) == 2
    assert outputs == stock
    torch._dynamo.reset()
    del layers
    gc.collect()


@pytest.mark.exhaustive
@pytest.mark.parametrize("architecture", SEEING, ids=lambda a: a.name)
def test_the_picture_is_seen(architecture, checkpoint_of, stock_of):
    """Another picture has another answer, so the rows above compare what was seen."""
    checkpoint = checkpoint_of(architecture)
    outputs, _ = ask(architecture, checkpoint, mandelbrot(-1), slots=4)
    stock = stock_of(architecture, False)
    assert outputs[0] != stock[0] and outputs[1:] == stock[1:]
