# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The rows of the matrix, and what stock must answer in each."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from tests.support.architectures import EXPERTS, Architecture
from tests.support.engine import Outputs

COMPILED = {"enforce_eager": False, "compilation_config": {"mode": 3}}


SHORT = {
    "MixtralForCausalLM",
    "Qwen3MoeForCausalLM",
    "Qwen3NextForCausalLM",
    "Qwen3_5MoeForCausalLM",
    "Qwen3_5MoeForConditionalGeneration",
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "Glm4MoeForCausalLM",
    "Llama4ForCausalLM",
    "Gemma4ForCausalLM",
    "Gemma4ForConditionalGeneration",
    "GptOssForCausalLM",
    "MiniMaxM2ForCausalLM",
    "Lfm2MoeForCausalLM",
    "GraniteMoeHybridForCausalLM",
}
"""The rows of `make test`: what most people run, and one of each kind of layer. The
others run in `make test-all`."""


def assert_meaningful(outputs: Outputs) -> None:
    """Numbers, and not the same token again and again: a broken model would agree with
    itself."""
    for _, logprobs in outputs:
        assert all(math.isfinite(p) for step in logprobs for p in step.values())
    assert len({token for tokens, _ in outputs for token in tokens}) > 5


def rows_of(architectures: Iterable[Architecture]) -> Iterator[Any]:
    """Every number of slots, eager and compiled: `make test` runs one of them."""
    for architecture in architectures:
        for compiled in (False, True):
            for slots in architecture.slot_counts:
                few = slots == EXPERTS // 4 and not compiled
                short = few and architecture.name in SHORT
                yield pytest.param(
                    architecture,
                    slots,
                    compiled,
                    marks=() if short else pytest.mark.exhaustive,
                    id=f"{architecture.name}-{slots}-"
                    + ("compiled" if compiled else "eager"),
                )
