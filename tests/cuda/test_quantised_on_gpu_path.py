# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The whole engine on the GPU's code with quantised experts: vLLM's loader, methods and
processing, its Triton kernel in the interpreter, or its Marlin kernel's Python around a
stand-in for the GEMM. Token ids and logprobs are those of all experts resident.

In float16: vLLM takes these formats in no float32, and bfloat16 is wrong in Triton's
interpreter. MXFP4, which vLLM takes in bfloat16 alone, runs in no kernel of Triton's.
"""

import gc
import json
import mmap
import shutil
from collections.abc import Callable
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.support import marlin_layer, quantised
from tests.support.engine import answers, assert_offloaded, moe_layers, sampling, start
from tests.support.fp8_checkpoints import FP8_FORMATS, INPUT_SCALES
from tests.support.marlin_engine import stand_in_for_marlin
from tests.support.quantised import EXPERTS, LAYERS, make_quantised, make_twin
from tests.support.stand_in import stand_in
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.manager import (
    CudaSlotManager,
)
from vllm.model_executor.layers.fused_moe.expert_slots.shared_store.catalogue import (
    stores,
)
from vllm.model_executor.layers.fused_moe.expert_slots.weights import parts
from vllm.model_executor.layers.fused_moe.expert_slots.weights.bundle import FEW
from vllm.model_executor.layers.fused_moe.expert_slots.weights.host_pages import (
    pages_of,
)
from vllm.model_executor.layers.fused_moe.expert_slots.weights.parts import parts_of

PROMPTS = ["You may reproduce and distribute", "Licensor shall"]
HIDDEN, WIDTH = 128, 256
_WEIGHTS, _OUTPUTS = 3 * HIDDEN * WIDTH, 2 * WIDTH + HIDDEN
_GROUPS = _WEIGHTS // 128


class Way(NamedTuple):
    """How a GPU of a capability runs a format, which is the first word of a name."""

    kernel: str
    bytes_per_expert: int
    capability: tuple[int, int] = (8, 9)
    backend: str = "auto"
    parts: int = ceil(EXPERTS / (FEW + 1))


WAYS = {
    "fp8-block": Way("TritonExperts", _WEIGHTS + _WEIGHTS // 128**2 * 4, parts=0),
    "fp8-channel": Way("TritonExperts", _WEIGHTS + _OUTPUTS * 4, parts=0),
    "fp8-static": Way("TritonExperts", _WEIGHTS + 2 * 4, parts=1),
    "int8": Way("TritonExperts", _WEIGHTS + _OUTPUTS * 4, (8, 0), parts=0),
    "int4-ct": Way("MarlinExperts", _WEIGHTS // 2 + _GROUPS * 2, (8, 6)),
    "int4-ct-asym": Way("MarlinExperts", _WEIGHTS // 2 + _GROUPS * 2 + _GROUPS // 2),
    "gptq": Way("MarlinExperts", _WEIGHTS // 2 + _GROUPS * 2 + _GROUPS // 2),
    "awq": Way("MarlinExperts", _WEIGHTS // 2 + _GROUPS * 2 + _GROUPS // 2, (12, 0)),
    "int4-ct by Triton": Way(
        "TritonWNA16Experts", _WEIGHTS // 2 + _GROUPS * 2, backend="triton"
    ),
    "fp8-block by Marlin": Way("MarlinExperts", _WEIGHTS + _GROUPS * 2, (8, 6)),
    "fp8-static by Marlin": Way(
        "MarlinExperts", _WEIGHTS + _OUTPUTS * 2, (8, 0), parts=1
    ),
    # Stock pads what is 128 wide outside the experts to 256.
    "mxfp4": Way(
        "MarlinExperts", _WEIGHTS + _WEIGHTS // 16 + (2 * WIDTH + 2 * HIDDEN) * 2
    ),
}
OF_MARLIN = [name for name, way in WAYS.items() if way.kernel == "MarlinExperts"]
QUICK = ("fp8-block", "gptq")


def marked(name: str) -> Any:
    return name if name in QUICK else pytest.param(name, marks=pytest.mark.exhaustive)


class Answers(NamedTuple):
    outputs: Any
    layers: list[Any]
    gemms: list[tuple]


def ask(checkpoint: Path, tokens: int = 3, **options: Any) -> Answers:
    llm = start(
        checkpoint,
        dtype="bfloat16" if "mxfp4" in checkpoint.name else "float16",
        max_model_len=64,
        max_num_batched_tokens=32,
        **options,
    )
    marlin_layer.gemms.clear()
    params = [sampling(tokens + i) for i in range(len(PROMPTS))]
    outputs = answers(llm.generate(PROMPTS, params, use_tqdm=False))
    layers = moe_layers(llm)
    del llm
    gc.collect()
    return Answers(outputs, layers, list(marlin_layer.gemms))


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory):
    """Small ones: the interpreter is slow."""
    home = tmp_path_factory.mktemp("quantised")

    def make(name: str, made_by: Callable[[Path, str], Path] = make_quantised) -> Path:
        name = name.split()[0]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(quantised, "HIDDEN", HIDDEN)
            patch.setattr(quantised, "WIDTH", WIDTH)
            patch.setattr(quantised, "FORMATS", quantised.FORMATS | FP8_FORMATS)
            return made_by(home / f"{name} {made_by.__name__}", name)

    return make


def stand_in_for_gpu(patch: pytest.MonkeyPatch, name: str) -> None:
    """With so little memory that layers are processed three experts at a time."""
    stand_in(patch, WAYS[name].capability)
    patch.setattr(parts, "PART_BYTES", 1)
    if WAYS[name].kernel == "MarlinExperts":
        stand_in_for_marlin(patch)


@pytest.fixture(scope="module")
def stock_of(checkpoint_of):
    """What stock answers with all experts resident, on the kernel that it picks by
    itself."""

    @cache
    def stock(name: str) -> Answers:
        with pytest.MonkeyPatch.context() as patch:
            stand_in_for_gpu(patch, name)
            found = ask(checkpoint_of(name), moe_backend=WAYS[name].backend)
        for layer in found.layers:
            kernel = layer.quant_method.moe_kernel.fused_experts
            assert type(kernel).__name__ == WAYS[name].kernel
        tokens = [ids for ids, _ in found.outputs]
        assert tokens[0][:3] != tokens[1][:3] and all(len(set(t)) > 1 for t in tokens)
        return found

    return stock


def assert_on_gpu_code(layers, name: str, slots: int) -> None:
    """The format's kernel ran on rows, and every tensor of an expert has a home on
    pages of its own, which kernels may read."""
    assert len(layers) == LAYERS
    assert_offloaded(layers, slots, EXPERTS)
    for layer in layers:
        kernel = layer.quant_method.moe_kernel.fused_experts
        assert type(kernel).__name__ == f"Slotted{WAYS[name].kernel}"
        assert isinstance(layer.slot_manager, CudaSlotManager)
        store = layer.slot_manager.store
        assert store.bytes_per_expert == WAYS[name].bytes_per_expert
        assert sum("scale" in tensor for tensor in store.tensors) == 2
        for home in store.tensors.values():
            assert home.data_ptr() % mmap.PAGESIZE == 0 and pages_of(home) is not None


def assert_blocks_were_mapped(stock: list[tuple], slots: list[tuple]) -> None:
    """Marlin's GEMMs got stock's alignment, and rows in the place of experts."""
    assert len(stock) == len(slots) > 0
    mapped = 0
    for (size, ids, experts, padded), (size_, ids_, rows, padded_) in zip(
        stock, slots, strict=True
    ):
        assert (size, padded) == (size_, padded_) and torch.equal(ids, ids_)
        assert len(experts.unique()) == len(rows.unique())
        mapped += not torch.equal(experts, rows)
    assert mapped


@pytest.mark.parametrize("name", [marked(name) for name in WAYS])
def test_the_engine_equals_stock(checkpoint_of, stock_of, monkeypatch, name):
    """Experts that stock rearranges are processed in parts, those with static
    activation scales in one, the others in host memory."""
    stock = stock_of(name)
    stand_in_for_gpu(monkeypatch, name)
    divided: list[int] = []

    def noted(layer) -> list[range]:
        found = parts_of(layer)
        divided.append(len(found))
        return found

    monkeypatch.setattr(parts, "parts_of", noted)
    found = ask(checkpoint_of(name), slots=4, moe_backend=WAYS[name].backend)
    assert found.outputs == stock.outputs
    assert_on_gpu_code(found.layers, name, 4)
    assert sum(layer.slot_manager.counters.staged for layer in found.layers) > 0
    assert divided == ([WAYS[name].parts] * LAYERS if WAYS[name].parts else [])
    if name in OF_MARLIN:
        assert_blocks_were_mapped(stock.gemms, found.gemms)


@pytest.mark.exhaustive
def test_auto_round_is_read_as_gptq(checkpoint_of, stock_of, monkeypatch, tmp_path):
    """The same integers under AutoRound's configuration have the same answers. (Stock's
    CPU platform takes no experts of AutoRound.)"""
    checkpoint = shutil.copytree(checkpoint_of("gptq"), tmp_path / "gptq")
    config = json.loads((checkpoint / "config.json").read_text())
    groups = config["quantization_config"]["group_size"]
    config["quantization_config"] = {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        "data_type": "int",
        "bits": 4,
        "group_size": groups,
        "sym": True,
        "extra_config": {
            ".*self_attn.*": {"bits": 16},
            ".*mlp.gate": {"bits": 16},
        },
    }
    (checkpoint / "config.json").write_text(json.dumps(config))
    stock = stock_of("gptq")
    stand_in_for_gpu(monkeypatch, "gptq")
    found = ask(checkpoint, slots=4)
    assert found.outputs == stock.outputs
    assert_on_gpu_code(found.layers, "gptq", 4)


def input_scales(layer) -> dict[str, float]:
    """As the layer has them, and as the kernel reads them."""
    config = layer.quant_method.moe_kernel.fused_experts.quant_config
    read = {"w13_input_scale": config.a1_scale, "w2_input_scale": config.a2_scale}
    for name, scale in read.items():
        assert scale.data_ptr() == getattr(layer, name).data_ptr()
    return {name: scale.max().item() for name, scale in read.items()}


@pytest.mark.parametrize(
    "name",
    ["fp8-static", *(pytest.param(n, marks=pytest.mark.exhaustive) for n in OF_MARLIN)],
)
def test_a_shared_store_is_built_then_attached(
    checkpoint_of, stock_of, monkeypatch, tmp_path, name
):
    """The second engine reads no expert. It has stock process a few experts of ones, so
    what holds for all experts must come from the store, and not from those."""
    stock = stock_of(name)
    stand_in_for_gpu(monkeypatch, name)
    for slots in (3, 5) if name != "mxfp4" else (4, 6):
        found = ask(checkpoint_of(name), slots=slots, shared_store=str(tmp_path))
        assert found.outputs == stock.outputs
        assert_on_gpu_code(found.layers, name, slots)
        if name == "fp8-static":
            for layer in found.layers:
                assert input_scales(layer) == pytest.approx(INPUT_SCALES)
    assert [store.state for store in stores(tmp_path)] == ["complete"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", WAYS)
def test_stock_is_near_the_twin(checkpoint_of, stock_of, name):
    """The first word of each prompt has about the logprobs of the same values in an
    unquantised model, on the CPU platform's own kernels: the stand-ins compute what
    they stand for."""
    twin = ask(checkpoint_of(name, make_twin), tokens=1)
    for (_, got), (_, expected) in zip(
        stock_of(name).outputs, twin.outputs, strict=True
    ):
        both = got[0].keys() & expected[0].keys()
        assert both
        # Activations are quantised too, or weights a second time.
        tolerance = 0.2 if "8" in name else 0.02
        for token in both:
            assert got[0][token] == pytest.approx(expected[0][token], abs=tolerance)
