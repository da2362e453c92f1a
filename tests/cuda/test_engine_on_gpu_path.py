# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The whole engine on the GPU's code: layer, manager, kernels and experts class, where
only the platform's answers, the device's memory and the functions of vLLM's CUDA
library are stood in for. In float32: bfloat16 is wrong in Triton's interpreter."""

import gc
import mmap
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

from tests.support import ROOT, python_path
from tests.support.apart import run_apart
from tests.support.architectures import ARCHITECTURES, Architecture
from tests.support.architectures.checkpoint import make_dummies_large, write_checkpoint
from tests.support.engine import answers, assert_offloaded, moe_layers, sampling, start
from tests.support.sample import make_checkpoint, make_gpt_oss
from tests.support.stand_in import stand_in
from tests.support.traces import check_counters
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.experts import (
    SlottedExperts,
)
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.manager import (
    CudaSlotManager,
)
from vllm.model_executor.layers.fused_moe.expert_slots.trace.reading import Trace
from vllm.model_executor.layers.fused_moe.expert_slots.weights.host_pages import (
    pages_of,
)

EXPERTS, TOP_K, LAYERS = 16, 2, 2
PROMPTS = ["You may reproduce and distribute", "a", "Licensor shall"]
SMALL = {"dtype": "float32", "max_model_len": 64, "max_num_batched_tokens": 32}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def checkpoint(directory):
    return make_checkpoint(
        directory / "qwen3-moe", EXPERTS, TOP_K, LAYERS, expert_width=32
    )


def ask(checkpoint, **options):
    llm = start(checkpoint, **SMALL, **options)
    outputs = llm.generate(PROMPTS, [sampling(4 + i) for i in range(3)], use_tqdm=False)
    found = answers(outputs), moe_layers(llm)
    del llm
    gc.collect()
    return found


def kernels(layers):
    return {type(layer.quant_method.moe_kernel.fused_experts) for layer in layers}


def token_ids(outputs):
    return [ids for ids, _ in outputs]


def assert_meaningful(outputs):
    """The prompts have answers of their own, of more than one word."""
    assert len({tuple(ids[:4]) for ids in token_ids(outputs)}) == len(PROMPTS)
    assert all(len(set(ids)) > 1 for ids in token_ids(outputs))


def assert_nearly_equal(outputs, reference):
    assert token_ids(outputs) == token_ids(reference)
    for (_, got), (_, expected) in zip(outputs, reference, strict=True):
        for here, there in zip(got, expected, strict=True):
            assert here == pytest.approx(there, abs=1e-4)


@pytest.fixture(scope="module")
def reference(checkpoint):
    """What stock answers with the CPU platform's own kernels."""
    outputs, layers = ask(checkpoint)
    assert not isinstance(
        layers[0].quant_method.moe_kernel.fused_experts, TritonExperts
    )
    assert_meaningful(outputs)
    return outputs


@pytest.fixture(scope="module")
def stock(checkpoint, reference):
    """What stock answers with its Triton kernel: the CPU platform's words, nearly its
    logprobs."""
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch)
        outputs, layers = ask(checkpoint)
    assert kernels(layers) == {TritonExperts}
    assert_nearly_equal(outputs, reference)
    return outputs


@pytest.fixture
def gpu_code(monkeypatch):
    stand_in(monkeypatch)


def assert_on_gpu_code(layers, slots, experts=EXPERTS):
    assert_offloaded(layers, slots, experts)
    for layer in layers:
        kernel = layer.quant_method.moe_kernel.fused_experts
        assert type(kernel).__mro__[1:3] == (SlottedExperts, TritonExperts)
        assert isinstance(layer.slot_manager, CudaSlotManager)
        for home in layer.slot_manager.store.tensors.values():
            assert home.data_ptr() % mmap.PAGESIZE == 0 and pages_of(home) is not None


@pytest.mark.parametrize(("slots", "policy"), [(2, "lru"), (4, "lfu"), (8, "lru")])
def test_the_engine_equals_stock(gpu_code, checkpoint, stock, slots, policy):
    """Token ids and logprobs are those of stock's Triton kernel with all experts
    resident."""
    outputs, layers = ask(checkpoint, slots=slots, policy=policy)
    assert len(layers) == LAYERS
    assert_on_gpu_code(layers, slots)
    assert outputs == stock
    assert sum(layer.slot_manager.counters.staged for layer in layers) > 0


def test_as_many_slots_as_experts_is_stock(gpu_code, checkpoint, stock):
    outputs, layers = ask(checkpoint, slots=EXPERTS)
    assert kernels(layers) == {TritonExperts}
    assert outputs == stock
    for layer in layers:
        assert layer.slot_manager is None and layer.quant_method.requires_device_loading
        assert pages_of(layer.w13_weight.data) is None


def test_a_shared_store_is_built_then_attached(gpu_code, checkpoint, stock, tmp_path):
    """The pages that kernels read are the file's, read-only for the host; no expert is
    read the second time."""
    for _ in range(2):
        outputs, layers = ask(
            checkpoint, slots=3, shared_store=str(tmp_path / "stores")
        )
        assert_on_gpu_code(layers, 3)
        assert outputs == stock
        home = layers[0].slot_manager.store.tensors["w13_weight"]
        maps = Path("/proc/self/maps").read_text().splitlines()
        (own,) = (line for line in maps if line.startswith(f"{home.data_ptr():x}-"))
        assert "r--s" in own and "experts.bin" in own


def test_a_warm_start(gpu_code, checkpoint, stock, tmp_path):
    """The second engine begins with the tables that the first one's kernels left. Its
    trace, written by the kernels, says so, and gives its counters."""
    options = {"slots": 8, "policy": "lfu", "warm_start": str(tmp_path / "residents")}
    outputs, layers = ask(checkpoint, **options)
    assert outputs == stock
    left = [layer.slot_manager.ranking() for layer in layers]
    llm = start(checkpoint, **SMALL, trace=str(tmp_path / "a.trace"), **options)
    assert [layer.slot_manager.ranking() for layer in moe_layers(llm)] == left
    assert [sorted(ranking.experts) for ranking in left] != [list(range(8))] * LAYERS
    llm.collective_rpc("expert_slot_residency")  # every slot holds its expert
    outputs = llm.generate(PROMPTS, [sampling(4 + i) for i in range(3)], use_tqdm=False)
    assert answers(outputs) == stock
    llm.llm_engine.model_executor.shutdown()
    trace = Trace.read(tmp_path / "a.trace")
    assert [layer.start for layer in trace.layers] == left
    check_counters(trace)


def test_warm_up_leaves_no_trace(gpu_code, checkpoint, stock, monkeypatch):
    """Real steps before the first request are undone: slots, tables, history and
    counters.

    A step without attention leaves hidden states uninitialised, so it is not sampled
    from: where every logit is NaN, Triton's interpreter fails in vLLM's sampler.
    """
    from vllm.v1.worker.cpu_worker import CPUWorker

    seen = []
    determine_available_memory = CPUWorker.determine_available_memory

    def profile(worker):
        runner = worker.model_runner
        runner._dummy_run(runner.max_num_tokens, skip_attn=True, is_profile=True)
        layers = [
            m for m in worker.get_model().modules() if getattr(m, "slot_manager", None)
        ]
        seen.extend(layer.slot_manager.counters.loads for layer in layers)
        return determine_available_memory(worker)

    monkeypatch.setattr(CPUWorker, "determine_available_memory", profile)
    llm = start(
        checkpoint,
        dtype="float32",
        max_model_len=64,
        max_num_batched_tokens=32,
        slots=4,
    )
    assert len(seen) >= LAYERS and all(loads > 0 for loads in seen)
    for layer in moe_layers(llm):
        manager = layer.slot_manager
        assert manager.residency() == [0, 1, 2, 3]
        assert not any(
            manager.counters.as_dict()[name] for name in ("steps", "needed", "loads")
        )
        for state in (manager.totals, manager.last_needed, manager.frequency):
            assert not state.any()
        for name, slots in manager.rows.slot_rows.items():
            assert torch.equal(slots, manager.store.tensors[name][:4])
    outputs = llm.generate(PROMPTS, [sampling(4 + i) for i in range(3)], use_tqdm=False)
    assert answers(outputs) == stock


def test_a_model_with_a_layer_class_of_its_own(directory, monkeypatch):
    """gpt-oss: biases, its own activation, and a loader that fills parameters
    itself."""
    checkpoint = make_gpt_oss(directory / "gpt-oss")
    reference, _ = ask(checkpoint)
    stand_in(monkeypatch)
    stock, _ = ask(checkpoint)
    assert_nearly_equal(stock, reference)
    outputs, layers = ask(checkpoint, slots=6)
    assert {type(layer).__name__ for layer in layers} == {"SlottedGptOssRoutedExperts"}
    assert_on_gpu_code(layers, 6)
    assert outputs == stock


@pytest.mark.exhaustive
@pytest.mark.parametrize("placement", ["linear", "round_robin"])
def test_two_ranks_of_expert_parallelism_equal_stocks(checkpoint, tmp_path, placement):
    """Two processes hold eight of the sixteen experts each, two in slots, and answer
    with the bits of stock's two. (Stock's CPU kernels know no expert parallelism.)"""
    options = {
        "environment": {
            "PYTHONPATH": python_path(ROOT / "tests" / "support" / "gpu_path", ROOT),
            "TRITON_INTERPRET": "1",
            # Inductor would ask the interpreter for a target.
            "TORCHDYNAMO_DISABLE": "1",
        },
        "prompts": [3 * PROMPTS[0], "a"],
        "tokens": 3,
        "dtype": "float32",
        "max_model_len": 64,
        "max_num_batched_tokens": 32,
        "tensor_parallel_size": 2,
        "enable_expert_parallel": True,
        "expert_placement_strategy": placement,
    }
    stock = run_apart(checkpoint, tmp_path / "stock.json", **options)
    slotted = run_apart(checkpoint, tmp_path / "slots.json", slots=2, **options)
    assert slotted.outputs == stock.outputs
    for rank in slotted.counters:
        assert len(rank) == LAYERS
        assert {layer["slots"] for layer in rank.values()} == {2}
        assert {layer["store_bytes"] for layer in rank.values()} == {
            8 * 3 * 32 * 128 * 4
        }
        assert sum(layer["loads"] for layer in rank.values()) > 0
    assert any(
        layer["overflow_steps"] for rank in slotted.counters for layer in rank.values()
    )


def topk_sigmoid(weights, ids, _, logits, renormalize, bias, factor=1, is_padding=None):
    """What vLLM's CUDA library does: the bias chooses, the score alone weighs."""
    scores = logits.float().sigmoid()
    chosen = (scores if bias is None else scores + bias).topk(ids.shape[1]).indices
    chosen_scores = scores.gather(1, chosen)
    if renormalize:
        chosen_scores /= chosen_scores.sum(1, keepdim=True)
    weights.copy_(chosen_scores * factor)
    ids.copy_(chosen)
    if is_padding is not None:
        ids.masked_fill_(is_padding.unsqueeze(1), -1)


@pytest.fixture
def sigmoid_routers(gpu_code, monkeypatch):
    """The router that stock picks on a GPU for a sigmoid with a bias: its router for
    the CPU has none, so MiniMax-M2 and Step-3.5 end there."""
    from vllm.model_executor.layers.fused_moe.router import router_factory

    from vllm import _custom_ops as ops

    cuda = SimpleNamespace(is_cpu=lambda: False)
    monkeypatch.setattr(router_factory, "current_platform", cuda)
    monkeypatch.setattr(ops, "topk_sigmoid", topk_sigmoid)


def test_a_sigmoid_router_of_minimax_m2(directory, sigmoid_routers):
    """Stock's words are those of transformers; from slots stock's bits."""
    architecture = routed_by_a_sigmoid("MiniMaxM2ForCausalLM", scoring_func="sigmoid")
    checkpoint = write_checkpoint(directory, architecture)
    stock, layers = ask(checkpoint)
    assert kernels(layers) == {TritonExperts}
    assert_meaningful(stock)
    assert token_ids(stock) == words_of_transformers(checkpoint)
    outputs, layers = ask(checkpoint, slots=4)
    assert_on_gpu_code(layers, 4)
    assert outputs == stock


@pytest.mark.exhaustive
def test_a_sigmoid_router_of_step_3p5(directory, sigmoid_routers, monkeypatch):
    """With its clipped SwiGLU in the second layer of experts, which no CPU kernel
    has."""
    make_dummies_large(monkeypatch)
    architecture = routed_by_a_sigmoid(
        "Step3p5ForCausalLM",
        moe_router_activation="sigmoid",
        swiglu_limits=[0, 0, 7.0],
    )
    checkpoint = write_checkpoint(directory, architecture)
    stock, layers = ask(checkpoint, load_format="dummy")
    assert kernels(layers) == {TritonExperts}
    assert_meaningful(stock)
    outputs, layers = ask(checkpoint, slots=4, load_format="dummy")
    assert_on_gpu_code(layers, 4)
    assert outputs == stock


def routed_by_a_sigmoid(name: str, **config: object) -> Architecture:
    """A row of the matrix, as it is published."""
    (row,) = (row for row in ARCHITECTURES if row.name == name)
    return replace(row, config=row.config | config)


def words_of_transformers(checkpoint):
    """What transformers answers to `PROMPTS`, as long as `ask` does."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    found = []
    for more, prompt in enumerate(PROMPTS):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        for _ in range(4 + more):
            with torch.no_grad():
                word = model(ids).logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, word], 1)
        found.append(ids[0, -4 - more :].tolist())
    return found
