# SPDX-License-Identifier: Apache-2.0
"""The whole engine on the GPU's code: layer, manager, kernels and experts class, where only the
platform's answers and the functions of vLLM's CUDA library are stood in for."""

import mmap
import sys
from pathlib import Path

import pytest
import torch
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().with_name("gpu_path")))
import gpu_path
from arm import run_arm
from engine import moe_layers, start
from sample import make_checkpoint

from vllm.model_executor.layers.fused_moe.expert_slots.device_slots import DeviceSlotManager
from vllm.model_executor.layers.fused_moe.expert_slots.experts import SlottedTritonExperts

EXPERTS, TOP_K, LAYERS = 16, 2, 2
PROMPTS = ["You may reproduce and distribute", "a"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(
        tmp_path_factory.mktemp("model") / "qwen3-moe", EXPERTS, TOP_K, LAYERS, expert_width=32
    )


@pytest.fixture(autouse=True)
def gpu_code(monkeypatch):
    gpu_path.stand_in(monkeypatch)


def answers(checkpoint, **options):
    from engine import answers, sampling

    llm = start(checkpoint, max_model_len=64, max_num_batched_tokens=32, **options)
    outputs = llm.generate(PROMPTS, [sampling(3), sampling(4)], use_tqdm=False)
    return answers(outputs), moe_layers(llm)


@pytest.mark.parametrize(("slots", "policy"), [(2, "lru"), (4, "lfu")])
def test_the_engine_equals_stock(checkpoint, slots, policy):
    """Token ids and logprobs are those of stock's Triton kernel with all experts resident."""
    stock, stock_layers = answers(checkpoint)
    assert {type(layer.quant_method.moe_kernel.fused_experts) for layer in stock_layers} == {
        TritonExperts
    }
    slotted, layers = answers(checkpoint, slots=slots, policy=policy)
    assert len(layers) == LAYERS
    for layer in layers:
        assert type(layer.quant_method.moe_kernel.fused_experts) is SlottedTritonExperts
        assert isinstance(layer.slots, DeviceSlotManager)
        assert layer.w13_weight.shape[0] == layer.w2_weight.shape[0] == slots
        counters = layer.slots.counters
        assert counters.loads > 0
        assert counters.hits + counters.misses == counters.needed
        residents = layer.slots.slot_to_expert.long()
        for name, home in layer.slots.store.tensors.items():
            assert home.shape[0] == EXPERTS and home.data_ptr() % mmap.PAGESIZE == 0
            assert torch.equal(getattr(layer, name).data, home[residents])
    assert sum(layer.slots.counters.overflow_steps for layer in layers) > 0
    assert slotted == stock


@pytest.mark.exhaustive
@pytest.mark.parametrize("placement", ["linear", "round_robin"])
def test_two_ranks_of_expert_parallelism_equal_stocks(checkpoint, tmp_path, placement):
    """Two processes hold eight of the sixteen experts each, two in slots, and answer with
    the bits of stock's two. (Stock's CPU kernels know no expert parallelism.)"""
    options = {
        "environment": {
            "PYTHONPATH": str(Path(gpu_path.__file__).parent),
            "TRITON_INTERPRET": "1",
            "TORCHDYNAMO_DISABLE": "1",  # inductor would ask the interpreter for a target
        },
        "prompts": [3 * PROMPTS[0], "a"],
        "tokens": 3,
        "max_model_len": 64,
        "max_num_batched_tokens": 32,
        "tensor_parallel_size": 2,
        "enable_expert_parallel": True,
        "expert_placement_strategy": placement,
    }
    stock = run_arm(checkpoint, tmp_path / "stock.json", **options)
    slotted = run_arm(checkpoint, tmp_path / "slots.json", slots=2, **options)
    assert slotted.outputs == stock.outputs
    for rank in slotted.counters:
        assert len(rank) == LAYERS
        assert {layer["slots"] for layer in rank.values()} == {2}
        assert {layer["store_bytes"] for layer in rank.values()} == {8 * 3 * 32 * 128 * 2}
        assert sum(layer["loads"] for layer in rank.values()) > 0
    assert any(layer["overflow_steps"] for rank in slotted.counters for layer in rank.values())
