# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What reaches a layer without any arguments, by the environment or by a VllmConfig
of a script, is refused by the layer with the same reasons."""

from types import SimpleNamespace

import pytest
from torch import nn
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)

from vllm.model_executor.layers.fused_moe.expert_slots.cpu.backend import CPUBackend
from vllm.model_executor.layers.fused_moe.expert_slots.refusals import reasons
from vllm.model_executor.layers.fused_moe.expert_slots.refusals.layers import (
    layer_objection,
)

SERVED = {"dp_size": 1, "pcp_size": 1, "enable_eplb": False, "is_lora_enabled": False}


def built(cls: type = RoutedExperts, **given: object) -> RoutedExperts:
    """A layer as stock has built one, as far as the objections ask. A constructor would
    make one of our classes where an engine with slots has run in this process."""
    layer = object.__new__(cls)
    nn.Module.__init__(layer)
    parallel = SimpleNamespace(**SERVED | given)
    layer.moe_config = SimpleNamespace(
        moe_parallel_config=parallel,
        is_lora_enabled=parallel.is_lora_enabled,
        experts_per_token=2,
        num_experts=16,
    )
    layer.quant_method = object.__new__(UnquantizedFusedMoEMethod)
    return layer


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"dp_size": 2}, reasons.DATA_PARALLEL),
        ({"pcp_size": 2}, reasons.CONTEXT_PARALLEL),
        ({"enable_eplb": True}, reasons.EPLB),
        ({"is_lora_enabled": True}, reasons.LORA),
    ],
)
def test_the_layer_gives_the_reason(given, reason):
    backend = SimpleNamespace(objection=lambda layer: None)
    assert layer_objection(built(), backend) is None
    assert layer_objection(built(**given), backend) == reason


def test_a_layer_is_looked_at_itself():
    """Its top-k, and a class that rewrites expert ids."""
    backend = SimpleNamespace(objection=lambda layer: None)
    layer = built()
    layer.moe_config.experts_per_token = 17
    assert "chooses 17 of 16 experts" in str(layer_objection(layer, backend))
    own = type("Rewriting", (RoutedExperts,), {"forward_modular": lambda self: None})
    assert "Rewriting rewrites expert ids" in str(layer_objection(built(own), backend))


def test_the_cpus_kernels_take_no_expert_map():
    method = SimpleNamespace(experts_cls=type("CPUExpertsBf16", (), {}))
    for use_ep, refused in ((False, False), (True, True)):
        layer = SimpleNamespace(use_ep=use_ep, quant_method=method)
        assert ("expert map" in str(CPUBackend().objection(layer))) == refused
