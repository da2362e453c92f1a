# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The names by which a refusal recognises a part of vLLM's models are still theirs: one
that vLLM renames would be served without a word."""

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER

from tools.vllm_versions import VERSIONS, release
from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError
from vllm.model_executor.layers.fused_moe.expert_slots.refusals.layers import (
    DECODE_ATTRIBUTES,
    STOCK_RUNNERS,
)
from vllm.model_executor.layers.fused_moe.expert_slots.refusals.load_formats import (
    EVERY_TENSOR,
    UNTESTED,
    passes_the_layers_by,
)
from vllm.model_executor.layers.fused_moe.expert_slots.refusals.models import (
    check_loaded,
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


MEGA_MOE = {
    "0.32.0": "vllm/models/deepseek_v4/nvidia/model.py",
    "0.33.0": "vllm/model_executor/layers/fused_moe/deep_gemm_mega_moe.py",
}


@pytest.mark.parametrize("version", VERSIONS)
def test_the_experts_of_mega_moe_are_elsewhere(version):
    """Its layer is not vLLM's fused-MoE layer, so the slots do not reach it, and its
    experts are found by the names of its parameters."""
    source = (release(version) / MEGA_MOE[version]).read_text()
    (own,) = re.findall(
        r"^class \w*MegaMoEExperts\(nn\.Module\):\n(.*?)(?=^class |\Z)",
        source,
        re.MULTILINE | re.DOTALL,
    )
    made = r"self\.(w\w+) = nn\.Parameter\(|_register_weight\(\"(w\w+)\", \(e,"
    names = ["".join(groups) for groups in re.findall(made, own)]
    assert {name.removesuffix("_weight") for name in names} >= {"w13", "w2"}
    layer = nn.Module()
    for name in names:
        layer.register_parameter(name, nn.Parameter(torch.zeros(16, 8, 8)))
    model = nn.ModuleDict({"experts": layer})
    moe = SimpleNamespace(is_moe=True, get_num_experts=lambda: 16, model="a model")
    with pytest.raises(MoEPrefetchError, match="do not go through vLLM's fused-MoE"):
        check_loaded(model, 8, moe)
