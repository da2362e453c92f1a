# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The rule that finds a layer's experts: every tensor is placed or stops the start."""

from typing import Any

import pytest
import torch
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEQuantConfig,
    FusedMoEQuantDesc,
)
from vllm.model_executor.layers.fused_moe.modular_kernel import (
    FusedMoEKernel,
    FusedMoEKernelModularImpl,
)

from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError
from vllm.model_executor.layers.fused_moe.expert_slots.weights.bundle import (
    FEW,
    Bundle,
    few_experts,
    parameters_of_experts,
)

EXPERTS = 6


def values(*shape: int) -> torch.Tensor:
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape)


def parameter(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)


class Experts:
    """In the place of stock's experts object."""

    __module__ = "vllm.model_executor.layers.fused_moe.experts.somewhere"


class Method:
    __module__ = "vllm.model_executor.layers.quantization.somewhere"
    num_experts: int
    moe_quant_config: Any
    experts: Any
    moe_kernel: Any


@pytest.fixture
def layer():
    """A layer as stock leaves it: one parameter under two names, scales that the
    quantisation config refers to, a layer-wide scale, the router's bias."""
    layer = torch.nn.Module()
    layer.layer_name, layer.local_num_experts = "model.layers.0.mlp", EXPERTS
    layer.moe_config = type("Config", (), {"num_local_experts": EXPERTS})()
    layer.w13_qweight = parameter(values(EXPERTS, 4, 2))
    layer.w2_weight = parameter(values(EXPERTS, 2, 2))
    layer.w13_scale = parameter(values(EXPERTS))
    layer.w13_input_scale = parameter(torch.tensor(3.0))
    layer.w13_g_idx = parameter(torch.empty(EXPERTS, 0))
    layer.w13_weight_shape = parameter(values(EXPERTS, 2))
    layer.e_score_correction_bias = parameter(values(EXPERTS))
    layer.w13_weight = layer.w13_qweight
    layer.quant_method = method = Method()
    method.num_experts = EXPERTS
    method.moe_quant_config = FusedMoEQuantConfig(
        FusedMoEQuantDesc(scale=layer.w13_input_scale),
        FusedMoEQuantDesc(),
        FusedMoEQuantDesc(scale=layer.w13_scale),
        FusedMoEQuantDesc(),
    )
    kernel = object.__new__(FusedMoEKernel)
    kernel.impl = object.__new__(FusedMoEKernelModularImpl)
    kernel.impl.fused_experts = method.experts = Experts()
    method.experts.quant_config = method.moe_quant_config
    method.moe_kernel = kernel
    return layer


def rows_for(bundle: Bundle) -> dict[str, torch.Tensor]:
    return {name: tensor + 100 for name, tensor in bundle.tensors().items()}


def test_experts_become_rows_wherever_they_are_kept(layer):
    """A tensor that stock keeps outside the layer follows, by its path."""
    layer.quant_method.experts.alphas = alphas = values(EXPERTS, 1)
    bundle = Bundle.of(layer, EXPERTS)
    path = "quant_method.moe_kernel.impl.fused_experts.alphas"
    assert set(bundle.experts) == {"w13_qweight", "w2_weight", "w13_scale"} | {
        next(name for name in bundle.experts if name.endswith(".alphas"))
    }
    assert path in bundle.experts or "quant_method.experts.alphas" in bundle.experts
    assert set(bundle.layer_wide) == {"w13_input_scale"}
    rows = rows_for(bundle)
    bundle.set_rows(layer, rows)
    assert layer.w13_weight.data_ptr() == rows["w13_qweight"].data_ptr()
    config = layer.quant_method.moe_quant_config
    assert config._w1.scale.data_ptr() == rows["w13_scale"].data_ptr()
    assert torch.equal(alphas, values(EXPERTS, 1) + 100)
    bundle.set_values({"w13_input_scale": torch.tensor([7.0])}, EXPERTS)
    assert config._a1.scale == 7 and layer.w13_input_scale == 7
    assert config._a1.scale.dim() == 0
    assert torch.equal(layer.e_score_correction_bias, values(EXPERTS))


def test_the_same_memory_in_another_object_follows(layer):
    layer.quant_method.experts.w1_scale = other = layer.w13_scale.data.view(EXPERTS)
    bundle = Bundle.of(layer, EXPERTS)
    rows = rows_for(bundle)
    bundle.set_rows(layer, rows)
    assert other.data_ptr() == rows["w13_scale"].data_ptr()


@pytest.mark.parametrize(
    ("kept", "reason"),
    [
        (lambda layer: layer.w13_weight.data[:, :2], "is a view of another tensor"),
        (lambda layer: layer.w13_weight.data.view(torch.int32), "is a view of another"),
        (lambda layer: values(2, EXPERTS).t(), "is not contiguous"),
        (lambda layer: values(EXPERTS * 4, 2), "has no row for each expert"),
        (lambda layer: values(3), "has no row for each expert"),
    ],
    ids=["view", "other dtype", "transposed", "flattened", "of something else"],
)
@pytest.mark.parametrize("place", ["descriptor", "experts", "list", "layer"])
def test_what_cannot_be_placed_stops_the_start(layer, kept, reason, place):
    """In one line: the layer, the path, the shape, why."""
    tensor = kept(layer)
    if place == "descriptor":
        layer.quant_method.moe_quant_config._w2.zp = tensor
    elif place == "experts":
        layer.quant_method.experts.strides = tensor
    elif place == "list":
        layer.quant_method.cache = {"deep": [(1, tensor)]}
    else:
        layer.copied = tensor
    with pytest.raises(MoEPrefetchError, match=reason) as refusal:
        Bundle.of(layer, EXPERTS)
    message = str(refusal.value)
    assert message.startswith("model.layers.0.mlp (Method): ") and "\n" not in message
    assert str(list(tensor.shape)) in message


def test_a_product_that_appears_later_is_found(layer):
    """Something made from the experts once rows were taken keeps values by expert."""
    bundle = Bundle.of(layer, EXPERTS)
    layer.quant_method.experts.alphas = layer.w13_scale * 2
    with pytest.raises(MoEPrefetchError, match=r"alphas.*was not moved to the slots"):
        bundle.set_rows(layer, rows_for(bundle))


@pytest.mark.parametrize("lost", ["w13_weight", "w2_weight"])
def test_the_weights_that_the_kernel_gets_are_in_it(layer, lost):
    """Wrapper objects of another library, as triton_kernels makes, are no tensors."""
    delattr(layer, lost)
    setattr(layer, lost, object())
    with pytest.raises(MoEPrefetchError, match=f"the kernel reads {lost}, which is no"):
        Bundle.of(layer, EXPERTS)


def test_an_expanded_value_is_layer_wide(layer):
    layer.w13_input_scale = parameter(torch.tensor([3.0]).expand(EXPERTS))
    bundle = Bundle.of(layer, EXPERTS)
    assert bundle.values()["w13_input_scale"].tolist() == [3]
    bundle.set_values({n: torch.tensor([7.0]) for n in bundle.values()}, EXPERTS)
    assert layer.w13_input_scale.tolist() == [7.0] * EXPERTS
    assert "w13_input_scale" in Bundle.of(layer, EXPERTS).layer_wide


def test_few_experts_stand_for_a_layer(layer):
    """Only within: counts come back. The router's tensors stay."""
    bias = layer.e_score_correction_bias
    layer.w2_weight.weight_loader = "its"
    # Processing makes the quantisation config and the kernel.
    layer.quant_method.moe_kernel = layer.quant_method.experts = None
    layer.quant_method.moe_quant_config = None
    with few_experts(layer, torch.device("cpu")):
        assert layer.local_num_experts == layer.quant_method.num_experts == FEW
        assert layer.moe_config.num_local_experts == FEW
        found = Bundle.of(layer, FEW)
    assert layer.local_num_experts == layer.quant_method.num_experts == EXPERTS
    assert layer.moe_config.num_local_experts == EXPERTS
    shapes = {name: tuple(tensor.shape) for name, tensor in found.tensors().items()}
    assert shapes["w13_qweight"] == (FEW, 4, 2) and shapes["w2_weight"] == (FEW, 2, 2)
    assert layer.w13_weight is layer.w13_qweight
    assert layer.e_score_correction_bias is bias and len(bias) == EXPERTS
    assert layer.w2_weight.weight_loader == "its"


def test_parameters_before_processing(layer):
    """Those of the router, shapes that nobody reads and activation scales are none."""
    layer.w13_input_scale = parameter(values(EXPERTS))
    assert set(parameters_of_experts(layer)) == {
        "w13_qweight",
        "w2_weight",
        "w13_scale",
        "w13_g_idx",
    }
