# SPDX-License-Identifier: Apache-2.0
"""vLLM's own fused-MoE kernel over slots and waves gives the bits of full residency."""

import pytest
import torch
from cuda_library import stand_in_for_cuda_library
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
    FusedMoEQuantConfig,
    RoutingMethodType,
    biased_moe_quant_config,
)
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

from vllm.model_executor.layers.fused_moe.expert_slots import device_slots, experts
from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchConfig
from vllm.model_executor.layers.fused_moe.expert_slots.device_slots import DeviceSlotManager
from vllm.model_executor.layers.fused_moe.expert_slots.experts import SlottedTritonExperts
from vllm.model_executor.layers.fused_moe.expert_slots.host_store import ExpertStore
from vllm.model_executor.layers.fused_moe.expert_slots.rank_map import RankMap
from vllm.model_executor.layers.fused_moe.expert_slots.slots import SlotBuffers

EXPERTS, HIDDEN, WIDTH, TOP_K = 16, 64, 32, 3


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    stand_in_for_cuda_library(monkeypatch)
    monkeypatch.setattr(device_slots, "_GATHER_PROGRAMS", 2)


def moe_config(dtype: torch.dtype, bias: bool) -> FusedMoEConfig:
    return FusedMoEConfig(
        num_experts=EXPERTS,
        experts_per_token=TOP_K,
        hidden_dim=HIDDEN,
        intermediate_size=WIDTH,
        num_local_experts=EXPERTS,
        num_logical_experts=EXPERTS,
        activation=MoEActivation.SILU,
        device="cpu",
        routing_method=RoutingMethodType.Renormalize,
        moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
        in_dtype=dtype,
        has_bias=bias,
    )


def run(layer: TritonExperts, x, w13, w2, weights, ids, expert_map=None) -> torch.Tensor:
    """`apply` as the modular kernel calls it; workspaces start as rubbish."""
    tokens = len(x)
    sizes = layer.workspace_shapes(
        tokens, 2 * WIDTH, HIDDEN, TOP_K, EXPERTS, len(w13), None, MoEActivation.SILU
    )
    spaces = [torch.full(size, float("nan"), dtype=x.dtype) for size in sizes]
    layer.apply(
        output=spaces[2],
        hidden_states=x,
        w1=w13,
        w2=w2,
        topk_weights=weights,
        topk_ids=ids,
        activation=MoEActivation.SILU,
        global_num_experts=EXPERTS,
        expert_map=expert_map,
        a1q_scale=None,
        a2_scale=None,
        workspace13=spaces[0],
        workspace2=spaces[1],
        expert_tokens_meta=None,
        apply_router_weight_on_input=False,
    )
    return spaces[2]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("slots", [3, 4, 8, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_slots_and_waves_equal_full_residency(monkeypatch, dtype, slots, bias):
    """Steps of one token and of many, over slots of every count, have the bits of all experts
    resident; and the kernel ran with the configuration of E."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.2).to(dtype)

    tensors = {"w13_weight": normal(EXPERTS, 2 * WIDTH, HIDDEN)}
    tensors["w2_weight"] = normal(EXPERTS, HIDDEN, WIDTH)
    if bias:
        tensors |= {"w13_bias": normal(EXPERTS, 2 * WIDTH), "w2_bias": normal(EXPERTS, HIDDEN)}
    store = ExpertStore(tensors)
    parameters = {n: torch.nn.Parameter(t, requires_grad=False) for n, t in tensors.items()}
    config = moe_config(dtype, bias)

    def quant_config(biases: dict[str, torch.Tensor]) -> FusedMoEQuantConfig:
        if not bias:
            return FusedMoEQuantConfig.make()
        return biased_moe_quant_config(biases["w13_bias"], biases["w2_bias"])

    resident = TritonExperts(config, quant_config(tensors))
    buffers = SlotBuffers(parameters, store, slots, torch.device("cpu"))
    slotted = SlottedTritonExperts(config, quant_config(parameters))
    slotted.slots = DeviceSlotManager(MoEPrefetchConfig(slots=slots), buffers)
    asked = []
    lookup = experts.try_get_optimal_moe_config

    def spy(w1_shape, w2_shape, *args, **kwargs):
        asked.append((w1_shape[0], w2_shape[0]))
        return lookup(w1_shape, w2_shape, *args, **kwargs)

    monkeypatch.setattr(experts, "try_get_optimal_moe_config", spy)
    for tokens in (1, 9, 2, 24):
        x = normal(tokens, HIDDEN)
        scores = torch.rand(tokens, EXPERTS, generator=generator)
        weights, ids = scores.topk(TOP_K)
        ids = ids.to(torch.int32)
        full = run(resident, x, tensors["w13_weight"], tensors["w2_weight"], weights, ids)
        got = run(slotted, x, parameters["w13_weight"], parameters["w2_weight"], weights, ids)
        assert full.isfinite().all() and torch.equal(got, full)
    counters = slotted.slots.counters
    assert counters.overflow_steps > 0 and counters.loads > 0
    assert set(asked) == {(EXPERTS, EXPERTS)}


def test_padding_rows_fetch_nobody():
    """Rows of id -1 load nothing, in one wave and in several; the other rows keep their bits."""
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "w13_weight": torch.randn(EXPERTS, 2 * WIDTH, HIDDEN, generator=generator),
        "w2_weight": torch.randn(EXPERTS, HIDDEN, WIDTH, generator=generator),
    }
    parameters = {n: torch.nn.Parameter(t, requires_grad=False) for n, t in tensors.items()}
    config, unquantised = moe_config(torch.float32, False), FusedMoEQuantConfig.make()
    buffers = SlotBuffers(parameters, ExpertStore(tensors), 4, torch.device("cpu"))
    slotted = SlottedTritonExperts(config, unquantised)
    slotted.slots = DeviceSlotManager(MoEPrefetchConfig(slots=4), buffers)
    resident = TritonExperts(config, unquantised)
    for tokens in (1, 8):
        x = torch.randn(tokens + 4, HIDDEN, generator=generator)
        weights, ids = torch.rand(tokens + 4, EXPERTS, generator=generator).topk(TOP_K)
        ids = ids.to(torch.int32)
        ids[tokens:] = -1
        before = slotted.slots.counters.needed
        got = run(slotted, x, parameters["w13_weight"], parameters["w2_weight"], weights, ids)
        assert slotted.slots.counters.needed - before == len(ids[:tokens].unique())
        full = run(resident, x, tensors["w13_weight"], tensors["w2_weight"], weights, ids)
        assert torch.equal(got[:tokens], full[:tokens])


@pytest.mark.parametrize("placement", ["linear", "round robin"])
@pytest.mark.parametrize("slots", [3, 4, 7])
def test_each_rank_of_expert_parallelism_equals_stocks(placement, slots):
    """Two ranks of eight experts each route ids of all sixteen; over slots, each has the bits of
    stock's rank, in one wave and in several, and counts its own experts alone."""
    generator = torch.Generator().manual_seed(2)
    w13 = torch.randn(EXPERTS, 2 * WIDTH, HIDDEN, generator=generator) * 0.2
    w2 = torch.randn(EXPERTS, HIDDEN, WIDTH, generator=generator) * 0.2
    for rank in range(2):
        everyone = torch.arange(EXPERTS)
        here = everyone[rank::2] if placement == "round robin" else everyone.chunk(2)[rank]
        expert_map = torch.full((EXPERTS,), -1, dtype=torch.int32)
        expert_map[here] = torch.arange(len(here), dtype=torch.int32)
        tensors = {"w13_weight": w13[here], "w2_weight": w2[here]}
        parameters = {n: torch.nn.Parameter(t, requires_grad=False) for n, t in tensors.items()}
        config, unquantised = moe_config(torch.float32, False), FusedMoEQuantConfig.make()
        buffers = SlotBuffers(parameters, ExpertStore(tensors), slots, torch.device("cpu"))
        slotted = SlottedTritonExperts(config, unquantised)
        slotted.slots = DeviceSlotManager(MoEPrefetchConfig(slots=slots), buffers)
        slotted.rank_map = RankMap(expert_map)
        resident = TritonExperts(config, unquantised)
        needed = 0
        for tokens in (1, 9, 2, 24):
            x = torch.randn(tokens, HIDDEN, generator=generator)
            weights, ids = torch.rand(tokens, EXPERTS, generator=generator).topk(TOP_K)
            ids = ids.to(torch.int32)
            needed += len(set(ids.unique().tolist()) & set(here.tolist()))
            full = run(resident, x, *tensors.values(), weights, ids, expert_map)
            got = run(slotted, x, *parameters.values(), weights, ids, expert_map)
            assert full.isfinite().all() and torch.equal(got, full)
        counters = slotted.slots.counters
        assert counters.needed == needed
        assert counters.overflow_steps > 0 and counters.loads > 0
        assert sorted(slotted.slots.residency()) == sorted(set(slotted.slots.residency()))
