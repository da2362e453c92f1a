# SPDX-License-Identifier: Apache-2.0
"""On the real engine, outputs from slots equal stock's bit for bit, and offload really happens."""

import gc

import pytest
import torch

PROMPTS = ["The licence grants", "You may reproduce and distribute copies of the Work " * 12, "a"]


def run(checkpoint, **additional_config):
    """Token ids and logprobs of a fresh engine, and what its MoE layers look like."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(checkpoint),
        max_model_len=512,
        max_num_batched_tokens=128,
        enforce_eager=True,
        additional_config=additional_config,
    )
    params = [
        SamplingParams(temperature=0, max_tokens=8 + 8 * i, logprobs=3, ignore_eos=True)
        for i in range(len(PROMPTS))
    ]
    outputs = []
    for output in llm.generate(PROMPTS, params, use_tqdm=False):
        completion = output.outputs[0]
        logprobs = [{t: p.logprob for t, p in step.items()} for step in completion.logprobs]
        outputs.append((completion.token_ids, logprobs))
    layers = []
    worker = llm.llm_engine.model_executor.driver_worker.worker
    for module in worker.get_model().modules():
        if hasattr(module, "local_num_experts") and hasattr(module, "w13_weight"):
            layers.append(module)
    del llm
    gc.collect()
    return outputs, layers


@pytest.fixture(scope="module")
def stock(checkpoint):
    return run(checkpoint)


def test_without_the_flag_layers_are_stock(stock):
    _, layers = stock
    assert all(layer.w13_weight.shape[0] == 32 and layer.slots is None for layer in layers)


@pytest.mark.parametrize(
    ("slots", "policy"), [(4, "lru"), (8, "lru"), (8, "lfu"), (16, "lru"), (31, "lfu")]
)
def test_outputs_equal_stock(checkpoint, stock, slots, policy):
    outputs, layers = run(
        checkpoint, moe_gpu_prefetch=slots, moe_gpu_prefetch_config={"policy": policy}
    )
    assert len(layers) == 4
    for layer in layers:
        assert layer.w13_weight.shape[0] == layer.w2_weight.shape[0] == slots
        counters = layer.slots.counters
        assert counters.hits + counters.misses == counters.needed > 0
        if slots <= 16:  # the long prompt needs more experts than that
            assert counters.waves > counters.steps and counters.overflow_steps > 0
        assert counters.bytes_loaded == counters.loads * layer.slots.store.bytes_per_expert > 0
        for name, master in layer.slots.store.tensors.items():
            residents = layer.slots.tables.slot_to_expert
            assert torch.equal(getattr(layer, name).data, master[residents])
    assert outputs == stock[0]


def test_below_top_k_is_raised_and_all_experts_is_full_residency(checkpoint, stock):
    outputs, layers = run(checkpoint, moe_gpu_prefetch=1)
    assert all(layer.w13_weight.shape[0] == 4 for layer in layers)
    assert outputs == stock[0]
    outputs, layers = run(checkpoint, moe_gpu_prefetch=32)
    assert all(layer.w13_weight.shape[0] == 32 and layer.slots is None for layer in layers)
    assert outputs == stock[0]
