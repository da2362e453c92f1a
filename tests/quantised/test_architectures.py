# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Architectures in the formats in which they are published: their own weight loaders,
shared experts and dense layers beside quantised experts. One row runs in `make test`.
"""

from dataclasses import replace

import pytest

from tests.support.architectures import ARCHITECTURES, EXPERTS
from tests.support.architectures.checkpoint import write_checkpoint
from tests.support.engine import assert_offloaded, run
from tests.support.quantised import quantise_experts
from tests.support.without_amx import gates_open, kernel_is_here

pytestmark = pytest.mark.skipif(
    not kernel_is_here(), reason="this vLLM has no kernel of quantised experts"
)
WIDE = {"hidden_size": 256, "moe_intermediate_size": 256}
ROWS = [
    ("Glm4MoeForCausalLM", "fp8-block"),
    ("DeepseekV3ForCausalLM", "fp8-block"),
    ("Qwen3NextForCausalLM", "fp8-block"),
    ("Qwen3NextForCausalLM", "int4-ct"),
]
"""Stock's CPU kernels take the routers of these: MiniMax's and, for INT4, GLM's and
DeepSeek's are refused by stock."""


@pytest.mark.parametrize(
    ("name", "form"),
    [
        pytest.param(
            *row,
            id=f"{row[0]}-{row[1]}",
            marks=() if number == 0 else pytest.mark.exhaustive,
        )
        for number, row in enumerate(ROWS)
    ],
)
def test_outputs_equal_stock(tmp_path, name, form):
    (architecture,) = (a for a in ARCHITECTURES if a.name == name)
    architecture = replace(architecture, config=architecture.config | WIDE)
    checkpoint = write_checkpoint(tmp_path, architecture)
    quantise_experts(checkpoint, form)
    with gates_open():
        stock = run(checkpoint, **architecture.engine)
        slotted = run(checkpoint, slots=4, **architecture.engine)
    assert slotted.outputs == stock.outputs
    assert len({token for tokens, _ in stock.outputs for token in tokens}) > 5
    assert_offloaded(slotted.layers, 4, EXPERTS)
    assert slotted.total("overflow_steps") > 0
    for layer in slotted.layers:
        kernel = layer.quant_method.moe_kernel.fused_experts
        assert type(kernel).__name__.startswith("SlottedCPUExperts")
