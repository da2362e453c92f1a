# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The quantised checkpoints of the tests, read by others: by compressed-tensors and
transformers, and by stock vLLM, without slots, which has to answer like transformers
does for the checkpoint's twin in bfloat16."""

import gc
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from vllm.model_executor.layers.fused_moe.experts import cpu_moe

from tests.support import packing, quantised
from tests.support.engine import start
from tests.support.gate_plugin.cpu_moe_gates import CLASSES
from tests.support.quantised import EXPERTS, FORMATS, LAYERS, ON_CPU
from tests.support.without_amx import PLUGIN, gates_open, kernel_is_here
from vllm import SamplingParams
from vllm.plugins import DEFAULT_PLUGINS_GROUP, load_plugins_by_group

HAS_AMX = torch.cpu._is_amx_tile_supported()
REFUSED = "No WNA16 MoE backend supports the deployment configuration"
REFUSALS = {
    "fp8-block": "Unsupported FP8 MoE backend: NONE",
    "int8": "No Int8 MoE backend supports the deployment configuration",
    "mxfp4": "No MXFP4 MoE backend supports the deployment configuration",
}
"""What stock says without the gate; `REFUSED` of the rest."""

TEXT = (
    "Subject to the terms of this License, each Contributor hereby grants to You a "
    "perpetual, worldwide, non-exclusive copyright license to reproduce and distribute "
    "the Work, with or without modifications, in Source or Object form."
)
Answer = tuple[list[int], list[int], list[float]]

needs_kernel = pytest.mark.skipif(
    not kernel_is_here(), reason="this vLLM has no kernel of quantised experts"
)
needs_no_amx = pytest.mark.skipif(HAS_AMX, reason="with AMX, nothing is refused")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    home = tmp_path_factory.mktemp("quantised")
    return lambda name: quantised.make_quantised(home / name, name)


@pytest.fixture(scope="module")
def answer(made: Callable[[str], Path]) -> Callable[[str], Answer]:
    """Stock's answer to `TEXT`: its tokens, the generated ones, and the logprobs of all
    but the first."""
    params = SamplingParams(
        temperature=0, max_tokens=8, logprobs=1, prompt_logprobs=0, ignore_eos=True
    )

    @cache
    def answer(name: str) -> Answer:
        with gates_open():
            llm = start(made(name))
            (output,) = llm.generate(TEXT, params, use_tqdm=False)
        del llm
        gc.collect()
        prompt, tokens = output.prompt_token_ids, list(output.outputs[0].token_ids)
        steps = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        chosen = zip(steps, [*prompt[1:], *tokens], strict=True)
        return prompt, tokens, [step[token].logprob for step, token in chosen]

    return answer


def weights(path: Path, layer: int = 0) -> dict[str, torch.Tensor]:
    """The experts' tensors of one layer, by what follows "experts."."""
    tensors = load_file(path / "model.safetensors").items()
    stem = f"model.layers.{layer}.mlp.experts."
    return {n.removeprefix(stem): t for n, t in tensors if n.startswith(stem)}


@pytest.mark.parametrize("name", FORMATS)
def test_an_expert_takes_the_bytes_of_its_format(made, name):
    for layer in range(LAYERS):
        size = sum(tensor.nbytes for tensor in weights(made(name), layer).values())
        assert size == EXPERTS * FORMATS[name].bytes_per_expert


@pytest.mark.parametrize("name", ["int4-ct", "int4-ct-asym"])
def test_compressed_tensors_unpacks_the_same_integers(made, name, tmp_path):
    tensors = weights(made(name))
    twin = weights(quantised.make_twin(tmp_path / "twin", name))
    matrix = "5.down_proj."
    shape = tensors[f"{matrix}weight_shape"]
    whole = unpack_from_int32(tensors[f"{matrix}weight_packed"], 4, shape)
    scale = tensors[f"{matrix}weight_scale"]
    zero = torch.zeros(scale.shape)
    if name == "int4-ct-asym":
        packed = tensors[f"{matrix}weight_zero_point"]
        zero = unpack_from_int32(packed, 4, torch.Size(scale.shape), packed_dim=0)
    assert len(whole.unique()) == 16
    centred = whole.view(*scale.shape, packing.GROUP) - zero[..., None].float()
    values = (centred * scale.float()[..., None]).view(*shape)
    assert torch.equal(values.bfloat16(), twin[f"{matrix}weight"])


def test_transformers_unpacks_the_same_mxfp4(made, tmp_path):
    tensors = weights(made("mxfp4"))
    twin = weights(quantised.make_twin(tmp_path / "twin", "mxfp4"))
    for matrix in ("gate_up_proj", "down_proj"):
        parts = (tensors[f"{matrix}_{part}"] for part in ("blocks", "scales"))
        assert torch.equal(convert_moe_packed_tensors(*parts), twin[matrix])


@needs_kernel
@pytest.mark.parametrize("name", [name for name in ON_CPU if name != "gptq"])
def test_stock_answers_like_the_twin(answer, name, tmp_path):
    """In the middle: near ties between experts send single tokens elsewhere."""
    prompt, tokens, logprobs = answer(name)
    assert all(math.isfinite(logprob) for logprob in logprobs)
    assert len(set(tokens)) > 4
    twin = AutoModelForCausalLM.from_pretrained(
        quantised.make_twin(tmp_path / "twin", name), dtype=torch.float32
    )
    ids = torch.tensor([[*prompt, *tokens]])
    with torch.inference_mode():
        rows = twin(ids).logits[0].log_softmax(-1)
    expected = rows[:-1].gather(1, ids[0, 1:, None])[:, 0]
    distance = (torch.tensor(logprobs) - expected).abs()
    assert distance.median() < 0.1


@needs_kernel
def test_the_same_integers_give_the_same_answer(answer):
    """GPTQ and compressed-tensors pack them in different ways."""
    assert answer("gptq") == answer("int4-ct")


@needs_no_amx
@pytest.mark.parametrize("name", ON_CPU)
def test_stock_refuses_without_the_gate(made, name):
    with pytest.raises(
        (ValueError, NotImplementedError), match=REFUSALS.get(name, REFUSED)
    ):
        start(made(name))


def test_stock_refuses_zero_points_of_compressed_tensors(made):
    """No gate of ours: its class for the CPU takes symmetric weights and AWQ."""
    with gates_open(), pytest.raises(NotImplementedError, match=REFUSED):
        start(made("int4-ct-asym"))


@needs_no_amx
def test_the_plugin_opens_the_gates(monkeypatch):
    def gates():
        return {getattr(cpu_moe, name)._supports_current_device() for name in CLASSES}

    monkeypatch.syspath_prepend(PLUGIN)
    register = load_plugins_by_group(DEFAULT_PLUGINS_GROUP)["cpu_moe_gates"]
    assert gates() == {False}
    with monkeypatch.context() as patch:
        register(patch.setattr)
        assert gates() == {True}
    assert gates() == {False}
    with gates_open():
        assert gates() == {True}
