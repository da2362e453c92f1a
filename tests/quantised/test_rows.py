# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""vLLM's own processing for its Marlin kernel makes the rows of an expert from that
expert alone. So the rows of a layer can be kept in any order, and be compared with a
layer that was processed whole. Where a value of all experts goes into each row, a layer
has to be processed whole.

The processing runs here as it is, but for the repacking of one matrix, which is a CUDA
kernel: a function that moves every word stands in.
"""

import gc
import weakref
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.fused_moe.experts.marlin_moe import MarlinExperts
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from tests.support.numbers import numbers_of
from tests.support.processed_layers import (
    EXPERTS,
    Format,
    of_few,
    processed,
    whole,
)
from vllm import _custom_ops as ops
from vllm.model_executor.layers.fused_moe.expert_slots.weights import (
    parts as weights_parts,
)
from vllm.model_executor.layers.fused_moe.expert_slots.weights.bundle import (
    FEW,
    Bundle,
    kinds_of_rows,
)
from vllm.model_executor.layers.fused_moe.expert_slots.weights.parts import (
    process_in_parts,
)

FP8 = torch.float8_e4m3fn
BOTH = ("w13", "w2")


def compressed(layout: str, inputs: dict[str, Any] | None = None, **weights: Any):
    group = {"targets": ["Linear"], "weights": weights, "format": layout}
    group["input_activations"] = inputs
    config = {"quant_method": "compressed-tensors", "format": layout, "ignore": []}
    return "compressed-tensors", config | {"config_groups": {"group_0": group}}


def modelopt(algorithm: str, **more: Any) -> dict[str, Any]:
    more |= {"quant_algo": algorithm, "exclude_modules": []}
    return {"quantization": more | {"kv_cache_quant_algo": None}}


INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
FLOAT4 = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "group"}
GPTQ = {"bits": 4, "group_size": 128, "desc_act": False, "lm_head": False}
FP8_CONFIG = {"quant_method": "fp8", "activation_scheme": "dynamic"}
AWQ = {"bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
PACKED = ("weight_packed", "weight_scale")
GPTQ_PARTS = ("qweight", "scales", "qzeros")
PLAIN = ("weight", "weight_scale")
NVFP4 = (
    "modelopt_fp4",
    modelopt("NVFP4", group_size=16),
    (*PLAIN, "weight_scale_2"),
)

FORMATS = {
    "int4-ct": Format(*compressed("pack-quantized", **INT4, symmetric=True), PACKED),
    "int4-ct-asym": Format(
        *compressed("pack-quantized", **INT4, symmetric=False),
        (*PACKED, "weight_zero_point"),
    ),
    "int8-ct": Format(
        *compressed("pack-quantized", **(INT4 | {"num_bits": 8}), symmetric=True),
        PACKED,
    ),
    "gptq": Format("auto_gptq", GPTQ | {"sym": True}, GPTQ_PARTS, unread=("qzeros",)),
    "gptq-bias": Format(
        "auto_gptq",
        GPTQ | {"sym": True},
        (*GPTQ_PARTS, "bias"),
        unread=("qzeros",),
        bias=True,
    ),
    "awq": Format("auto_awq", AWQ, GPTQ_PARTS, dtype=torch.float16),
    "fp8-block": Format(
        "fp8",
        FP8_CONFIG | {"weight_block_size": [128, 128]},
        ("weight", "weight_scale_inv"),
    ),
    "fp8-static": Format(
        "fp8",
        FP8_CONFIG | {"activation_scheme": "static"},
        PLAIN,
        wide=("input_scale",),
    ),
    "fp8-ct-channel": Format(
        *compressed(
            "float-quantized",
            FLOAT8 | {"strategy": "token", "dynamic": True},
            strategy="channel",
            **FLOAT8,
        ),
        PLAIN,
    ),
    "mxfp8": Format("modelopt_mxfp8", modelopt("MXFP8"), PLAIN),
    "mxfp4": Format("gpt_oss_mxfp4", {}, (*PLAIN, "bias"), bias=True),
    "mxfp4-ct": Format(
        *compressed("mxfp4-pack-quantized", **FLOAT4, group_size=32), PLAIN
    ),
    "nvfp4": Format(*NVFP4, dtype=torch.float16),
}


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch):
    def repacked(weight, size_k, size_n, bits, *_) -> torch.Tensor:
        words = weight.flatten().roll(7).flip(0)
        return words.view(size_k // 16, size_n * bits // 2)

    def fp8(weight, scale):
        return (weight / scale).to(FP8), scale

    for name in ("gptq_marlin_repack", "awq_marlin_repack"):
        monkeypatch.setattr(torch.ops._C, name, repacked, raising=False)
    monkeypatch.setattr(ops, "scaled_fp8_quant", fp8)
    monkeypatch.setattr(MarlinExperts, "_supports_current_device", lambda: True)


def differing(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> set:
    """Names whose bits differ."""
    assert found.keys() == wanted.keys()

    def bits(tensor: torch.Tensor) -> torch.Tensor:
        flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.flatten())
        return flat.view(torch.uint8)

    return {n for n in found if not torch.equal(bits(found[n]), bits(wanted[n]))}


def of_experts(
    tensors: dict[str, torch.Tensor], experts: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The same of some experts, in this order. Some formats have empty parameters."""
    return {name: t[experts] if len(t) else t for name, t in tensors.items()}


def rows_of(layer: RoutedExperts, names: Any) -> dict[str, torch.Tensor]:
    return {name: getattr(layer, name).data for name in names}


def names(parts: tuple[str, ...]) -> set[str]:
    """Of both weights. A part with "{}" is a path, with the number of the GEMM."""
    return {
        part.format(gemm) if "{}" in part else f"{role}_{part}"
        for gemm, role in enumerate(BOTH, 1)
        for part in parts
    }


def read_by_the_kernel(layer: RoutedExperts) -> list[torch.Tensor]:
    """What stock's `apply` hands its kernel of each expert."""
    kernel = layer.quant_method.moe_kernel.fused_experts
    ends = ("w{}_scale", "w{}_zp", "w{}_bias", "g{}_alphas", "w{}_scale_val")
    found = [getattr(kernel, end.format(gemm), None) for end in ends for gemm in (1, 2)]
    return [layer.w13_weight, layer.w2_weight, *(t for t in found if t is not None)]


def check_attached(form: Format, layer: RoutedExperts, tensors: Any) -> None:
    """A layer whose experts are in a shared store has a few of ones processed. All
    that the kernel reads besides the tensors is as if all experts had been."""
    few, _ = processed(form, tensors, of_few)
    found, wanted = Bundle.of(few, FEW), Bundle.of(layer, EXPERTS)
    assert found.values().keys() == wanted.values().keys()
    assert kinds_of_rows(found.tensors()) == kinds_of_rows(wanted.tensors())
    numbers = numbers_of(layer)
    assert any(path.startswith("quant_method.moe_kernel.") for path in numbers)
    assert numbers_of(few) == numbers


def check_in_parts(form: Format, tensors: Any, ranks: int) -> None:
    """A layer that is processed in parts has the same rows, and all that the kernel
    reads besides them is as if all experts had been processed at once. Of a part
    nothing is left when the next begins, though no garbage is collected. A layer whose
    experts are not made alone stays in one part."""
    of_last_part: list[weakref.ref[torch.Tensor]] = []

    def process(layer: RoutedExperts) -> None:
        assert not [made for made in of_last_part if made() is not None]
        whole(layer)
        of_part = Bundle.of(layer, layer.local_num_experts).experts.values()
        of_last_part[:] = [weakref.ref(t) for places in of_part for t in places]

    def in_parts(layer: RoutedExperts) -> None:
        gc.disable()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(weights_parts, "PART_BYTES", 1)
            assert len(weights_parts.parts_of(layer)) == (2 if form.in_parts else 1)
            results.append(process_in_parts(layer, process, torch.device("cpu")))
        gc.enable()

    results: list[tuple[Bundle, dict[str, torch.Tensor]]] = []
    layer, _ = processed(form, tensors, ranks=ranks)
    found, _ = processed(form, tensors, in_parts, ranks)
    assert layer.global_num_experts == ranks * EXPERTS
    wanted, [(last, homes)] = Bundle.of(layer, EXPERTS), results
    assert not differing(homes, wanted.tensors())
    assert not differing(last.values(), wanted.values())
    assert numbers_of(found) == numbers_of(layer)
    assert found.local_num_experts == EXPERTS
    rows = {name: home.clone() for name, home in homes.items()}
    last.set_values(last.values(), EXPERTS)
    last.set_rows(found, rows)
    assert {t.data_ptr() for t in read_by_the_kernel(found)} <= {
        t.data_ptr() for t in rows.values()
    }


def check(form: Format, alone_differs: set[str], method: str | None = None) -> None:
    """Another order of experts makes the same rows in that order; an expert that is
    processed alone makes its own, except in `alone_differs`. The kernel reads rows that
    were put in the place of the experts."""
    layer, tensors = processed(form)
    assert method in (None, type(layer.quant_method).__name__)
    bundle = Bundle.of(layer, EXPERTS)
    assert bundle.experts.keys() == names(form.parts)
    assert bundle.layer_wide.keys() == names(form.wide)
    whole = bundle.tensors()
    order = torch.tensor([2, 0, 3, 1])
    permuted, _ = processed(form, of_experts(tensors, order))
    expected = {name: rows[order] for name, rows in whole.items()}
    assert not differing(rows_of(permuted, whole), expected)
    assert not differing(Bundle.of(permuted, EXPERTS).values(), bundle.values())
    assert differing(rows_of(permuted, whole), whole) == set(whole)
    expert = EXPERTS - 1
    one, _ = processed(form, of_experts(tensors, torch.tensor([expert])))
    expected = {name: rows[expert:] for name, rows in whole.items()}
    assert differing(rows_of(one, whole), expected) == alone_differs
    check_attached(form, layer, tensors)
    if not alone_differs:
        for ranks in (1, 2):
            check_in_parts(form, tensors, ranks)
    moved = {name: rows.clone() for name, rows in whole.items()}
    bundle.set_rows(layer, moved)
    read = {tensor.data_ptr() for tensor in read_by_the_kernel(layer)}
    places = {rows.data_ptr(): name for name, rows in moved.items()}
    assert read <= places.keys()
    assert {places[at] for at in places.keys() - read} == names(form.unread)


@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_made_from_their_expert_alone(name):
    """With the names of what an expert consists of, and of what is shared."""
    check(FORMATS[name], set())


def test_bfloat16_nvfp4_scales_depend_on_all_experts():
    """vLLM scales all of a layer's scales by a factor of their largest, and takes it
    out of each expert's global scale."""
    check(Format(*NVFP4), names(("weight_scale", "weight_scale_2")))


def test_int8_activations_depend_on_all_experts(monkeypatch):
    """VLLM_MARLIN_INPUT_DTYPE=int8: scales become integers, as parts of the layer's
    largest."""
    monkeypatch.setenv("VLLM_MARLIN_INPUT_DTYPE", "int8")
    config = compressed("pack-quantized", **(INT4 | {"group_size": 64}), symmetric=True)
    form = Format(*config, PACKED, dtype=torch.float16)
    check(form, names(("weight_scale",)))
