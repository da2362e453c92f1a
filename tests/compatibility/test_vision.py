# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A vision-language model with MoE layers sees its picture from slots as stock does."""

from PIL import Image

from tests.support.engine import (
    PROMPTS,
    answers,
    assert_offloaded,
    moe_layers,
    sampling,
    start,
)
from tests.support.sample import make_aria


def test_aria(tmp_path):
    """A prompt with a picture, beside one without."""
    checkpoint = make_aria(tmp_path / "aria")
    picture = Image.effect_mandelbrot((490, 490), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    prompts = [
        {"prompt": "<|img|>The picture shows", "multi_modal_data": {"image": picture}},
        {"prompt": PROMPTS[1]},
    ]
    found = {}
    for slots in (None, 2, 4, 15):
        options = {} if slots is None else {"slots": slots}
        llm = start(
            checkpoint,
            limit_mm_per_prompt={"image": 1},
            max_num_batched_tokens=512,
            **options,
        )
        found[slots] = answers(llm.generate(prompts, sampling(12), use_tqdm=False))
        if slots is not None:
            assert_offloaded(moe_layers(llm), slots, 16)
            assert len(moe_layers(llm)) == 2
            assert found[slots] == found[None]
        del llm
