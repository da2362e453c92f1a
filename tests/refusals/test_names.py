# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The names by which a refusal recognises a part of vLLM's models are still theirs: one
that vLLM renames would be served without a word."""

import re

import pytest
from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER

from tools.vllm_versions import VERSIONS, release
from vllm.model_executor.layers.fused_moe.expert_slots.refusals.layers import (
    DECODE_ATTRIBUTES,
    STOCK_RUNNERS,
)
from vllm.model_executor.layers.fused_moe.expert_slots.refusals.load_formats import (
    EVERY_TENSOR,
    UNTESTED,
    passes_the_layers_by,
)


@pytest.mark.parametrize("attribute", DECODE_ATTRIBUTES)
def test_a_model_of_vllm_sets_the_attribute(attribute):
    """On itself, in the newest release; 0.32 has no such model."""
    models = release("0.33.0") / "vllm" / "models"
    assert any(
        re.search(rf"^\s*self\.{attribute}\b.* = ", file.read_text(), re.MULTILINE)
        for file in models.rglob("*.py")
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_the_runners_that_are_served_are_vllms(version):
    for module, name in STOCK_RUNNERS.items():
        file = release(version) / f"{module.replace('.', '/')}.py"
        assert re.search(rf"^class {name}\(", file.read_text(), re.MULTILINE)


def test_every_load_format_has_been_judged():
    """One that a later vLLM adds is untested until a test shows it to be exact."""
    judged = {"dummy"} | EVERY_TENSOR | UNTESTED
    formats = set(_LOAD_FORMAT_TO_MODEL_LOADER)
    assert {f for f in formats - judged if not passes_the_layers_by(f)} == set()
    assert judged <= formats
