# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Answers from slots beside stock's, token ids and logprobs: a small real checkpoint
whose prompts are read in chunks beside requests that decode, in steps that need every
expert. One engine each, several side by side."""

import gc
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
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
    "engine as asked": True,
    "loaded": True,
    "staging is shared": True,
    "slots hold their experts": True,
    "trace": EQUAL,
}
"""What these columns must say."""

ON_A_GPU: Row = {"attention_backend": "TRITON_ATTN", "moe_backend": "triton"}
AS_WRITTEN = {"combo_kernels": False, "benchmark_combo_kernel": False}
"""Inductor times whether to combine kernels, in each process anew. Other kernels round
in another way."""

MODEL: Row = {"layers": 2, "hidden": 1024, "expert_width": 1024}
"""On a GPU: rows so wide that each is a page or more, as in real models."""

BOTH, NONE = "FULL_AND_PIECEWISE", "NONE"
SYNC_CHECK = "VLLM_GPU_SYNC_CHECK"
"""vLLM's own check: an error where a step waits for the device."""


@dataclass(frozen=True)
class Arm:
    """Stock's engine, and those that are compared with it.

    Attributes:
        engines: options of slots of each that is compared; none: stock once more.
        options: of all of them.
        environment: of all of them.
        graphs: the mode of their CUDA graphs.
        first: whether `--first` runs them, but those with `LATER_SLOTS`.
    """

    engines: tuple[Row, ...]
    options: Row = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    graphs: str = BOTH
    first: bool = False


EIGHT: Row = {"slots": 8, "policy": "lfu"}
LATER_SLOTS = (4, 16)
ARMS = {
    "bfloat16": Arm(
        (
            {**EIGHT, "trace": "bfloat16.trace"},
            {},
            {"slots": 31, "policy": "lru"},
            {"slots": 4, "policy": "lru"},
            {"slots": 16, "policy": "lru"},
        ),
        first=True,
    ),
    "model runner V1": Arm(
        (EIGHT,), environment={"VLLM_USE_V2_MODEL_RUNNER": "0"}, first=True
    ),
    "no waiting": Arm((EIGHT,), environment={SYNC_CHECK: "error"}, first=True),
    "float16": Arm((EIGHT,), {"dtype": "float16"}),
    "FULL": Arm((EIGHT,), graphs="FULL"),
    "PIECEWISE": Arm((EIGHT,), graphs="PIECEWISE"),
    "top-1": Arm(
        ({"slots": 1, "policy": "lfu"},), {"hf_overrides": {"num_experts_per_tok": 1}}
    ),
    "no graphs": Arm((EIGHT,), graphs=NONE),
}
"""By name. The model has 32 experts and top-4. On a GPU vLLM's own choice is the model
runner V2."""

ON_A_CPU = ("bfloat16", "top-1")


def exact(options: Options) -> list[Row]:
    """One row for each engine that is compared."""
    at_once, sizes = (1, {}) if options.cpu else beside_each_other()
    requests = [
        request(name, number, options.cpu, sizes)
        for name, arm in ARMS.items()
        if not options.cpu or name in ON_A_CPU
        for number in range(1 + len(arm.engines))
    ]
    checkpoint()  # before engines side by side look for it
    return run_engines("exact", requests, rows_of, options, at_once)


def request(name: str, number: int, cpu: bool, sizes: Row) -> Row:
    """An engine of an arm: number 0 is its stock.

    Args:
        sizes: of `beside_each_other`.
    """
    arm = ARMS[name]
    slots = ({}, *arm.engines)[number]
    again = number > 0 and not slots
    who = f"N = {slots['slots']}" if slots else "stock" + " again" * again
    asked = {"dtype": "bfloat16", **arm.options, **slots}
    asked["enforce_eager"] = cpu or arm.graphs == NONE
    if not cpu:
        compilation = {"inductor_compile_config": AS_WRITTEN}
        asked |= ON_A_GPU | sizes
        asked["compilation_config"] = compilation | {"cudagraph_mode": arm.graphs}
    # Stock once more compiles anew, and beside the first.
    environment = {"VLLM_DISABLE_COMPILE_CACHE": "1"} if again else {}
    return {
        **{"name": f"{name}, {who}", "arm": name, "exact": asked},
        "environment": arm.environment | environment,
        "first": arm.first and slots.get("slots") not in LATER_SLOTS,
    }


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
    row["engine as asked"] = all(as_asked(each) for each in (stock, request))
    shown = [name for name in (*CHECKS, *COUNTED) if name in measured]
    return [{**row, **{name: measured[name] for name in shown}}]


def as_asked(request: Row) -> bool:
    """Whether the engine was what the arm is about. The CPU has one model runner, and
    no graphs."""
    arm, asked, was = ARMS[request["arm"]], request["exact"], request["measured"]["was"]
    runner = "V1" if "VLLM_USE_V2_MODEL_RUNNER" in arm.environment else "V2"
    wanted = {
        "slots": "slots" in asked,
        "top-k": asked.get("hf_overrides", {}).get("num_experts_per_tok", 4),
        "dtype": asked["dtype"],
        "sync check": arm.environment.get(SYNC_CHECK),
    }
    if "compilation_config" in asked:
        wanted |= {"runner": runner, "graphs": arm.graphs}
    return wanted.items() <= was.items()


def what_it_is(llm: Any, layers: Sequence[Any]) -> Row:
    """What an engine became."""
    config = llm.llm_engine.vllm_config
    worker = llm.llm_engine.model_executor.driver_worker.worker
    kernel = layers[0].quant_method.moe_kernel.fused_experts
    return {
        "runner": "V2" if ".gpu." in type(worker.model_runner).__module__ else "V1",
        "graphs": config.compilation_config.cudagraph_mode.name,
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "top-k": layers[0].top_k,
        "slots": type(kernel).__name__.startswith("Slotted"),
        "sync check": os.environ.get(SYNC_CHECK),
    }


def measure_exact(request: Row) -> Row:
    """What an engine answers, and what it is. From slots also whether every slot holds
    its expert afterwards, what was counted, and whether that follows from the engine's
    trace."""
    from tests.support.engine import ask, start

    asked = dict(request["exact"])
    if "trace" in asked:
        asked["trace"] = str(engine.WORK / asked["trace"])
    llm = start(checkpoint(), **asked)
    seen = ask(llm, slotted="slots" in asked)
    measured: Row = {"outputs": seen.outputs, "was": what_it_is(llm, seen.layers)}
    if "slots" not in asked:
        return measured
    memory = seen.layers[0].slot_manager.rows.memory
    measured["slots hold their experts"] = all(map(holds, seen.layers))
    measured["staging is shared"] = memory.staging > 0
    measured |= {name: seen.total(name) for name in COUNTED}
    measured["loaded"] = measured["loads"] > 0
    if "trace" in asked:
        llm.llm_engine.model_executor.shutdown()
        del llm, seen, memory
        gc.collect()
        measured["trace"] = checked(Path(asked["trace"]))
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
