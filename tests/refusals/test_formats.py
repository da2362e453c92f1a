# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Formats of experts that slots do not serve are refused by name, with the reason and
the way out."""

import ast
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)

from vllm.model_executor.layers.fused_moe.expert_slots.cpu.experts import (
    CPU_EXPERTS_CLASSES,
)
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.experts import (
    TRITON_EXPERTS_CLASSES,
)
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.marlin_experts import (
    MARLIN_EXPERTS_CLASSES,
)
from vllm.model_executor.layers.fused_moe.expert_slots.refusals import formats
from vllm.model_executor.layers.fused_moe.expert_slots.refusals.formats import (
    KERNELS,
    format_objection,
    kernel_reason,
)

SERVED = CPU_EXPERTS_CLASSES | TRITON_EXPERTS_CLASSES | MARLIN_EXPERTS_CLASSES

CHECKPOINT = "Serve a checkpoint in a format of docs/quantisation.md"
BACKEND = "Use --moe-backend triton or marlin"
CHANNELS = "Serve a checkpoint with a scale for each channel"


def layer(
    method: str,
    kernel: str | None = None,
    *,
    name: str = "compressed-tensors",
    module: str = "vllm.model_executor.layers.quantization.some",
    monolithic: bool = False,
    **attributes: Any,
) -> SimpleNamespace:
    """A layer as stock builds it, with a method and a kernel of these names."""
    experts_cls = kernel and type(
        kernel, (), {"is_monolithic": staticmethod(lambda: monolithic)}
    )
    members = {"__module__": module, "experts_cls": experts_cls, **attributes}
    return SimpleNamespace(
        quant_method=type(method, (), members)(),
        quant_config=SimpleNamespace(get_name=lambda: name),
    )


PER_TENSOR = {"static_input_scales": False, "weight_qscheme": "per_tensor"}
REFUSED = {
    "bitsandbytes": (
        layer("BitsAndBytesMoEMethod", name="bitsandbytes", module="a.plugin"),
        "quantisation bitsandbytes: its method unpacks all experts",
        CHECKPOINT,
    ),
    "GGUF": (
        layer("GGUFMoEMethod", name="gguf", module="a.plugin"),
        "quantisation gguf: its method reads the experts by expert id",
        CHECKPOINT,
    ),
    "Humming": (
        layer("HummingMoEMethod", "HummingIndexedExperts", name="inc"),
        "quantisation inc runs it with Humming, as vLLM does for 2, 3, 5, 6 and 7 bits",
        CHECKPOINT,
    ),
    "online": (
        layer("Fp8PerBlockOnlineMoEMethod", "TritonExperts", uses_meta_device=True),
        "(Fp8PerBlockOnlineMoEMethod) quantises while it loads",
        "Quantise the checkpoint offline",
    ),
    "online, on the CPU": (
        layer("Int8OnlineMoEMethod", "CPUExpertsInt8", uses_meta_device=True),
        "(Int8OnlineMoEMethod) quantises while it loads",
        "Quantise the checkpoint offline",
    ),
    "W4A8 FP8": (
        layer("CompressedTensorsW4A8Fp8MoEMethod", "CutlassExpertsW4A8Fp8"),
        "its kernel is CutlassExpertsW4A8Fp8: no test shows it to be exact on rows",
        CHECKPOINT,
    ),
    # vLLM has two classes of this name. This one is not served.
    "W4A8 INT8": (
        layer("CompressedTensorsW4A8Int8MoEMethod", "CPUExpertsInt4"),
        "(W4A8 INT8): the kernel routes tokens itself",
        CHECKPOINT,
    ),
    "a monolithic kernel": (
        layer("SomeMoEMethod", "CPUExpertsInt4", monolithic=True),
        "its kernel is CPUExpertsInt4: it routes tokens itself",
        CHECKPOINT,
    ),
    "MXFP4 on CUTLASS": (
        layer("INCMxfp4MoEMethod", "CutlassExpertsMxfp4", name="inc"),
        "its kernel is CutlassExpertsMxfp4: no test shows it to be exact on rows",
        CHECKPOINT,
    ),
    "a method without a test": (
        layer("QuarkNvfp4MoEMethod", "MarlinExperts", name="quark"),
        "quantisation quark: no test shows that slots follow what QuarkNvfp4MoEMethod",
        CHECKPOINT,
    ),
    "TRT-LLM": (
        layer("Fp8MoEMethod", "TrtLlmFp8ExpertsModular", name="fp8"),
        "its kernel is TrtLlmFp8ExpertsModular: it reads layouts and factors",
        BACKEND,
    ),
    "FlashInfer CUTLASS": (
        layer("ModelOptNvFp4FusedMoE", "FlashInferExperts"),
        "its kernel is FlashInferExperts: its tuning makes stock differ from itself",
        BACKEND,
    ),
    "b12x": (
        layer("CompressedTensorsW4A4Mxfp4MoEMethod", "FlashInferB12xExperts"),
        "its kernel is FlashInferB12xExperts: its tuning makes stock differ",
        BACKEND,
    ),
    "triton_kernels": (
        layer("GptOssMxfp4MoEMethod", "UnfusedOAITritonExperts"),
        "its kernel is UnfusedOAITritonExperts: it keeps the weights in objects of",
        BACKEND,
    ),
    "Humming as a kernel": (
        layer("Fp8MoEMethod", "HummingGroupedExperts", name="fp8"),
        "its kernel is HummingGroupedExperts: it packs weights for a layout of its own",
        CHECKPOINT,
    ),
    "batched": (
        layer("AutoGPTQMoEMethod", "BatchedMarlinExperts"),
        "its kernel is BatchedMarlinExperts: it sorts tokens by expert",
        BACKEND,
    ),
    "static INT8 of Quark": (
        layer("QuarkW8A8Int8MoEMethod", static_input_scales=True),
        "Quark INT8 with static activation scales runs past vLLM's fused-MoE kernels",
        CHANNELS,
    ),
    # As some models of vLLM's have it, with experts of two precisions in a layer.
    "mixed precision": (
        layer("HeterogeneousMoEMethod", "MarlinExperts", module="vllm.models.a_model"),
        "its method vllm.models.a_model.HeterogeneousMoEMethod belongs to a model",
        "may read weights by expert id",
    ),
    "another plugin's": (
        layer("OwnMoEMethod", "TritonExperts", module="a_plugin"),
        "its method a_plugin.OwnMoEMethod belongs to another plugin",
        "may read weights by expert id",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_format_is_refused_by_name(name):
    """Where it has a kernel that slots serve, too."""
    refused, reason, way_out = REFUSED[name]
    words = format_objection(refused)
    assert words is not None and reason in words and way_out in words
    assert "\n" not in words and not words.endswith(".")


@pytest.mark.parametrize("old", [True, False])
def test_int8_of_quark_with_one_scale_for_each_expert(monkeypatch, old):
    """On 0.32 its kernel takes the scale of row 0 for all experts."""
    monkeypatch.setattr(formats, "VLLM_0_33", not old)
    words = format_objection(
        layer("QuarkW8A8Int8MoEMethod", "TritonExperts", **PER_TENSOR)
    )
    assert (words is not None) == old
    if words:
        assert "takes the scale of row 0 for all of them. Use vLLM 0.33" in words


def test_8_bit_activations_of_marlin(monkeypatch):
    """An environment variable of vLLM's. It means nothing to other kernels."""
    marlin = layer("AutoGPTQMoEMethod", "MarlinExperts")
    triton = layer("Fp8MoEMethod", "TritonExperts")
    assert format_objection(marlin) is None
    monkeypatch.setenv("VLLM_MARLIN_INPUT_DTYPE", "int8")
    words = format_objection(marlin)
    assert words is not None and words.startswith("VLLM_MARLIN_INPUT_DTYPE=int8 with")
    assert words.endswith("Unset it") and format_objection(triton) is None


@pytest.mark.parametrize("kernel", sorted(SERVED))
def test_kernels_that_are_served_are_in_no_table_of_refusals(kernel):
    """So each kernel has one answer."""
    assert kernel_reason(kernel) is None
    assert format_objection(layer("Fp8MoEMethod", kernel)) is None


def test_what_is_not_known_is_left_to_the_platform():
    """Unquantised layers, and tested methods without a kernel."""
    method = object.__new__(UnquantizedFusedMoEMethod)
    plain = SimpleNamespace(quant_method=method, quant_config=None)
    assert format_objection(plain) is None
    assert format_objection(layer("Fp8MoEMethod")) is None


def _stocks(folder: str) -> dict[str, ast.ClassDef]:
    """Classes of vLLM's sources below a folder; imported they would need a GPU."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.submodule_search_locations
    for place in spec.submodule_search_locations:
        root = Path(place) / "model_executor" / "layers" / folder
        if root.is_dir():
            trees = (ast.parse(path.read_text()) for path in root.rglob("*.py"))
            nodes = (node for tree in trees for node in tree.body)
            return {n.name: n for n in nodes if isinstance(n, ast.ClassDef)}
    raise AssertionError(folder)


def test_every_name_is_one_of_stocks():
    """A name that a version of vLLM drops is no refusal of anything."""
    kernels, methods = _stocks("fused_moe/experts"), _stocks("quantization")
    for part in KERNELS:
        assert any(part in name for name in kernels), part
    for name in (
        "HummingMoEMethod",
        "CompressedTensorsW4A8Int8MoEMethod",
        "QuarkW8A8Int8MoEMethod",
    ):
        assert name in methods
    said = ast.unparse(methods["OnlineMoEMethodBase"])
    assert "uses_meta_device" in said
    for attribute in PER_TENSOR:
        said = ast.unparse(methods["QuarkW8A8Int8MoEMethod"])
        assert f"self.{attribute} = " in said
