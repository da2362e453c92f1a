# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Each difference between the supported versions, with stand-ins for the version that
is not installed. `make lint` checks that each vLLM has those shapes."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

import vllm
from vllm.model_executor.layers.fused_moe.expert_slots import versions


@pytest.fixture(params=[False, True], ids=["0.32", "0.33"])
def newer(request, monkeypatch):
    monkeypatch.setattr(versions, "VLLM_0_33", request.param)
    return request.param


def module(monkeypatch, name, **names):
    stand_in = ModuleType(name)
    vars(stand_in).update(names)
    monkeypatch.setitem(sys.modules, name, stand_in)


def test_the_installed_version_is_told():
    """What is installed decides, once, when the module is loaded."""
    assert (not vllm.__version__.startswith("0.32")) == versions.VLLM_0_33


def test_the_opaque_op_has_the_tag_of_stocks(newer):
    """Inductor treats the inputs of both alike, or compiled code would differ from
    stock's."""
    (tag,) = versions.moe_op_tags()
    assert tag == (
        torch.Tag.needs_exact_strides if newer else torch.Tag.needs_fixed_stride_order
    )
    if newer == (not vllm.__version__.startswith("0.32")):
        from vllm.model_executor.layers.fused_moe.expert_slots.cpu import (  # noqa: F401
            experts,
        )

        stock = torch.ops.vllm.moe_forward.default.tags
        assert tag in stock and tag in torch.ops.vllm.moe_expert_slots.default.tags


def test_kernels_that_route_are_ruled_out_where_vllm_can(newer):
    """The field is set where it exists, and not invented where it does not."""
    moe_config = SimpleNamespace()
    versions.keep_routing_apart(moe_config)
    assert vars(moe_config) == ({"require_decomposed_backend": True} if newer else {})


def test_the_kv_cache_is_counted_by_the_functions_of_that_version(newer, monkeypatch):
    """0.33 asks the platform for a builder and hands it to each; 0.32 knows none."""
    if newer:
        core = "vllm.v1.core.kv_cache_config_builder"
        module(
            monkeypatch,
            core,
            get_kv_cache_config_builder=lambda config: ("builder", config),
        )
        module(
            monkeypatch,
            "vllm.v1.core.kv_cache_planning",
            get_kv_cache_groups_from_builder=lambda *given: ["groups", *given],
            _max_memory_usage_bytes_from_groups=lambda *given: ("sequence", *given),
            _pool_bytes_per_block_from_builder=lambda *given: ("block", *given),
        )
    else:
        module(
            monkeypatch,
            "vllm.v1.core.kv_cache_utils",
            get_kv_cache_groups=lambda *given: ["groups", *given],
            _max_memory_usage_bytes_from_groups=lambda *given: ("sequence", *given),
            _pool_bytes_per_block=lambda *given: ("block", *given),
        )
    builder = (("builder", "config"),) if newer else ()
    groups = ["groups", *builder, "config", "specs"]
    assert versions.kv_cache_bytes("config", "specs") == (
        ("sequence", *builder, "config", groups),
        ("block", *builder, "config", groups),
    )
