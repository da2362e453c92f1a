# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Runs the real engine in this process and looks at its layers afterwards."""

import gc
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchConfig

PROMPTS = [
    "The licence grants",
    "You may reproduce and distribute copies of the Work " * 12,
    "a",
]
"""The long one needs every expert of the sample, in several chunks of the prefill."""

OPTIONS = tuple(
    field.name for field in fields(MoEPrefetchConfig) if field.name != "slots"
)
"""Of `--moe-gpu-prefetch-config`."""

Outputs = list[tuple[list[int], list[dict[int, float]]]]


@dataclass
class Run:
    """Token ids and logprobs of every prompt, the MoE layers that computed them, and
    what the engine answered about its slots."""

    outputs: Outputs
    layers: list[Any]
    counters: dict[str, dict[str, int]]

    def total(self, name: str) -> int:
        return sum(layer[name] for layer in self.counters.values())


def start(checkpoint: Path, **arguments: Any) -> Any:
    """A small engine; slots=N and the names of `OPTIONS` stand for our keys of
    additional_config."""
    from vllm import LLM

    slots = arguments.pop("slots", None)
    options = {name: arguments.pop(name) for name in OPTIONS if name in arguments}
    if slots is not None:
        arguments["additional_config"] = {
            "moe_gpu_prefetch": slots,
            "moe_gpu_prefetch_config": options,
        }
    defaults = {
        "max_model_len": 512,
        "max_num_batched_tokens": 128,
        "enforce_eager": True,
    }
    return LLM(str(checkpoint), **(defaults | arguments))


def moe_layers(llm: Any) -> list[Any]:
    model = llm.llm_engine.model_executor.driver_worker.worker.get_model()
    return [module for module in model.modules() if isinstance(module, RoutedExperts)]


def answers(outputs: Any) -> Outputs:
    return [
        (
            list(output.outputs[0].token_ids),
            [
                {t: p.logprob for t, p in step.items()}
                for step in output.outputs[0].logprobs
            ],
        )
        for output in outputs
    ]


def sampling(tokens: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=tokens, logprobs=3, ignore_eos=True)


def run(checkpoint: Path, **arguments: Any) -> Run:
    """Answers `PROMPTS`, of different lengths, on an engine of its own."""
    llm = start(checkpoint, **arguments)
    seen = ask(llm, slotted="slots" in arguments)
    del llm
    gc.collect()
    return seen


def ask(llm: Any, slotted: bool) -> Run:
    """What an engine answers to `PROMPTS`; and counted, if it was asked for slots."""
    params = [sampling(8 + 8 * i) for i in range(len(PROMPTS))]
    outputs = answers(llm.generate(PROMPTS, params, use_tqdm=False))
    counters = llm.collective_rpc("expert_slot_counters")[0] if slotted else {}
    return Run(outputs, moe_layers(llm), counters)


def assert_offloaded(layers: list[Any], slots: int, experts: int) -> None:
    """Every layer keeps stock's shape but holds `slots` experts and staging that all
    layers share, the rest lives in the store, loads happened, and every slot holds the
    rows of the expert that the tables name."""
    import torch

    assert layers
    for layer in layers:
        manager = layer.slot_manager
        counters = manager.counters.as_dict()
        assert counters["hits"] + counters["misses"] == counters["needed"] > 0
        assert counters["misses"] == counters["loads"] > 0
        assert counters["staged"] + counters["evictions"] == counters["loads"]
        per_expert = manager.store.bytes_per_expert
        assert counters["bytes_loaded"] == counters["loads"] * per_expert > 0
        assert counters["slot_bytes"] == slots * per_expert
        assert counters["store_bytes"] == experts * per_expert
        rows = {tensor.data_ptr() for tensor in manager.rows.tensors.values()}
        assert {layer.w13_weight.data_ptr(), layer.w2_weight.data_ptr()} <= rows
        residents = manager.residency()
        assert len(residents) == slots
        for name, master in manager.store.tensors.items():
            parameter = getattr(layer, name)
            assert parameter.shape == master.shape and len(master) == experts
            assert parameter.data_ptr() == manager.rows.tensors[name].data_ptr()
            assert torch.equal(parameter.data[experts - slots :], master[residents])
    assert_memory_is_shared(layers, slots, experts)


def assert_memory_is_shared(layers: list[Any], slots: int, experts: int) -> None:
    """All layers' rows lie in one memory, which is L * N + (E - N) experts and not L *
    E."""
    (memory,) = {layer.slot_manager.rows.memory for layer in layers}
    sizes = [
        (name, experts, experts - slots, tensor[0].nbytes)
        for layer in layers
        for name, tensor in layer.slot_manager.rows.tensors.items()
    ]
    elastic = [size for size in sizes if size[2] * size[3] >= memory.page]
    rows = sum(size[3] for size in elastic)
    staging = rows // len(layers) * (experts - slots)
    assert abs(memory.committed - (rows * slots + staging)) <= 2 * memory.page * len(
        elastic
    )
