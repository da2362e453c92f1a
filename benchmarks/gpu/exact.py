# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Answers from slots beside stock's, token ids and logprobs: a small real checkpoint
whose prompts are read in chunks beside requests that decode, in steps that need every
expert. One engine each, several side by side."""

import gc
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import engine
from benchmarks.gpu.engine import COUNTED
from benchmarks.gpu.runs import Options, beside_each_other, run_engines
from benchmarks.results import Row

EQUAL = "equals the counters"
CHECKS = {
    "equal to stock": True,
    "loaded": True,
    "staging is shared": True,
    "slots hold their experts": True,
    "trace": EQUAL,
}
"""What these columns must say."""

ON_A_GPU: Row = {
    **{"attention_backend": "TRITON_ATTN", "moe_backend": "triton"},
    "enforce_eager": False,
}
AS_WRITTEN = {"combo_kernels": False, "benchmark_combo_kernel": False}
"""Inductor times whether to combine kernels, in each process anew. Other kernels round
in another way."""

MODEL: Row = {"layers": 2, "hidden": 1024, "expert_width": 1024}
"""On a GPU: rows so wide that each is a page or more, as in real models."""

TOP_1 = {"hf_overrides": {"num_experts_per_tok": 1}}
V1 = {"environment": {"VLLM_USE_V2_MODEL_RUNNER": "0"}}
NO_WAITING = {"environment": {"VLLM_GPU_SYNC_CHECK": "error"}}
"""vLLM's own check: an error where a step waits for the device."""

AGAIN: Row = {"again": True}
EIGHT: Row = {"slots": 8, "policy": "lfu"}
ARMS: dict[str, tuple[Row, list[Row]]] = {
    "bfloat16": (
        {},
        [
            {**EIGHT, "traced": True},
            AGAIN,
            {"slots": 31, "policy": "lru"},
            {"slots": 4, "policy": "lru"},
            {"slots": 16, "policy": "lru"},
        ],
    ),
    "model runner V1": (V1, [EIGHT]),
    "no waiting": (NO_WAITING, [EIGHT]),
    "float16": ({"dtype": "float16"}, [EIGHT]),
    "FULL": ({"cudagraph_mode": "FULL"}, [EIGHT]),
    "PIECEWISE": ({"cudagraph_mode": "PIECEWISE"}, [EIGHT]),
    "top-1": (TOP_1, [{"slots": 1, "policy": "lfu"}]),
    "no graphs": ({"enforce_eager": True}, [EIGHT]),
}
"""By name: options of stock's engine, and of the engines that are compared with it. The
model has 32 experts and top-4. On a GPU vLLM's own choice is the model runner V2, and
graphs FULL_AND_PIECEWISE."""

BESIDE: Row = {"environment": {}, "traced": False}
"""What a request has beside the engine's options."""

ON_A_CPU = ("bfloat16", "top-1")
FIRST_ARMS, LATER_SLOTS = ("bfloat16", "model runner V1", "no waiting"), (4, 16)
"""What `--first` runs: as many engines as a large GPU takes at once."""


def exact(options: Options) -> list[Row]:
    """One row for each engine that is compared."""
    at_once, sizes = (1, {}) if options.cpu else beside_each_other()
    requests = []
    for arm, (of_arm, compared) in ARMS.items():
        if options.cpu and arm not in ON_A_CPU:
            continue
        for of_engine in ({}, *compared):
            asked = {"dtype": "bfloat16", **of_arm, **of_engine}
            again = " again" * asked.pop("again", False)
            who = f"N = {asked['slots']}" if "slots" in asked else f"stock{again}"
            mode = asked.pop("cudagraph_mode", None)
            beside = {name: asked.pop(name, value) for name, value in BESIDE.items()}
            if options.cpu:
                asked["enforce_eager"] = True
            else:
                compilation: Row = {"inductor_compile_config": AS_WRITTEN}
                if mode:
                    compilation["cudagraph_mode"] = mode
                asked = {
                    **ON_A_GPU,
                    **sizes,
                    "compilation_config": compilation,
                    **asked,
                }
            first = arm in FIRST_ARMS and asked.get("slots") not in LATER_SLOTS
            request = {"name": f"{arm}, {who}", "arm": arm, "first": first, **beside}
            requests.append({**request, "exact": asked})
    checkpoint()  # before engines side by side look for it
    return run_engines("exact", requests, rows_of, options, at_once)


def rows_of(request: Row, done: list[Row]) -> list[Row]:
    """The row of an engine that is compared; none before its stock has answered."""
    asked, measured = request["exact"], request["measured"]
    stock = next((d for d in done if d["name"] == f"{request['arm']}, stock"), None)
    if stock is None or stock is request:
        return []
    row: Row = {"engine": request["name"], "policy": asked.get("policy", "")}
    for who, answer in (("stock", stock["measured"]), ("this", measured)):
        if "failed" in answer:
            why = f"{who}: {answer['failed']}"
            return [{**row, "equal to stock": False, "failed": why}]
    row["equal to stock"] = measured["outputs"] == stock["measured"]["outputs"]
    shown = [name for name in (*CHECKS, *COUNTED) if name in measured]
    return [{**row, **{name: measured[name] for name in shown}}]


def measure_exact(request: Row) -> Row:
    """What an engine answers. From slots also whether every slot holds its expert
    afterwards, what was counted, and whether that follows from the engine's trace."""
    from tests.support.engine import PROMPTS, answers, moe_layers, sampling, start

    asked = dict(request["exact"])
    trace = engine.WORK / f"{request['arm']}.trace"
    if request["traced"]:
        asked["trace"] = str(trace)
    llm = start(checkpoint(), **asked)
    params = [sampling(8 + 8 * i) for i in range(len(PROMPTS))]
    outputs = answers(llm.generate(PROMPTS, params, use_tqdm=False))
    measured: Row = {"outputs": outputs}
    if "slots" not in asked:
        return measured
    layers = moe_layers(llm)
    measured["slots hold their experts"] = all(map(holds, layers))
    measured["staging is shared"] = layers[0].slot_manager.rows.memory.staging > 0
    counters = llm.collective_rpc("expert_slot_counters")[0].values()
    measured |= {name: sum(layer[name] for layer in counters) for name in COUNTED}
    measured["loaded"] = measured["loads"] > 0
    del layers
    if request["traced"]:
        llm.llm_engine.model_executor.shutdown()
        del llm
        gc.collect()
        measured["trace"] = checked(trace)
    return measured


def checkpoint() -> Path:
    """A small model of 32 experts, written once."""
    from tests.support.sample import make_checkpoint

    on_gpu = torch.cuda.is_available()
    directory = engine.WORK / ("qwen3-moe-wide" if on_gpu else "qwen3-moe")
    return make_checkpoint(directory, **(MODEL if on_gpu else {}))


def holds(layer: Any) -> bool:
    """Whether every slot of a layer holds the expert that the tables name."""
    manager = layer.slot_manager
    residents = manager.residency()
    return all(
        torch.equal(manager.rows.slot_rows[name].cpu(), home[residents])
        for name, home in manager.store.tensors.items()
    )


def checked(path: Path) -> str:
    """Whether the engine's counters follow from its trace."""
    from tests.support.traces import check_counters
    from vllm.model_executor.layers.fused_moe.expert_slots.trace.reading import Trace

    try:
        check_counters(Trace.read(path))
    except Exception as error:  # whatever it is, it is the result
        return f"{type(error).__name__}: {error}"
    return EQUAL
