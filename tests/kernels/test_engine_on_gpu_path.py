# SPDX-License-Identifier: Apache-2.0
"""The whole engine on the GPU's code: layer, manager, kernels and experts class, where only the
platform's answers and the functions of vLLM's CUDA library are stood in for."""

import mmap
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cuda_library import stand_in_for_cuda_library
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
from vllm.model_executor.layers.fused_moe.oracle import unquantized

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from engine import moe_layers, start
from sample import make_checkpoint

from vllm.model_executor.layers.fused_moe.expert_slots import device_slots, pinning, routed_experts
from vllm.model_executor.layers.fused_moe.expert_slots.device_slots import DeviceSlotManager
from vllm.model_executor.layers.fused_moe.expert_slots.experts import SlottedTritonExperts

EXPERTS, TOP_K, LAYERS = 16, 2, 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(
        tmp_path_factory.mktemp("model") / "qwen3-moe", EXPERTS, TOP_K, LAYERS, expert_width=32
    )


@pytest.fixture(autouse=True)
def gpu_code(monkeypatch):
    """Stock picks its Triton kernel; our layer believes it is on CUDA; nothing is pinned."""
    stand_in_for_cuda_library(monkeypatch)
    monkeypatch.setattr(
        unquantized,
        "_get_priority_backends",
        lambda _: [unquantized.UnquantizedMoeBackend.TRITON],
    )
    monkeypatch.setattr(TritonExperts, "_supports_current_device", staticmethod(lambda: True))
    cuda = SimpleNamespace(is_cuda=lambda: True, is_cpu=lambda: False)
    monkeypatch.setattr(routed_experts, "current_platform", cuda)
    monkeypatch.setattr(pinning, "pin", lambda tensor: None)
    monkeypatch.setattr(device_slots, "_GATHER_PROGRAMS", 2)


def answers(checkpoint, **options):
    from engine import answers, sampling

    llm = start(checkpoint, max_model_len=64, max_num_batched_tokens=32, **options)
    outputs = llm.generate(
        ["You may reproduce and distribute", "a"], [sampling(3), sampling(4)], use_tqdm=False
    )
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
