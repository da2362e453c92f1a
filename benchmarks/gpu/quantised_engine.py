# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What one engine with quantised experts answers and counts, for `quantised.py`."""

import gc
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import engine
from benchmarks.results import Row
from tests.support import quantised
from tests.support.fp8_checkpoints import FP8_FORMATS
from vllm.model_executor.layers.fused_moe.expert_slots.layer import ExpertSlotsMixin
from vllm.model_executor.layers.fused_moe.expert_slots.replacing import replaced
from vllm.model_executor.layers.fused_moe.expert_slots.weights import parts
from vllm.model_executor.layers.fused_moe.expert_slots.weights.layout import split
from vllm.model_executor.layers.fused_moe.expert_slots.weights.rows import ExpertRows
from vllm.plugins.moe_gpu_prefetch import start as start_up

PROMPT_TOKENS = 8
"""Of prompts that are asked one at a time. With so few rows stock repeats itself."""

STOCK_RUNS = 3
SIZES = {"HIDDEN": 512, "WIDTH": 1024}
PART_BYTES = 4 << 20
"""Of a layer, processed at a time: layers of these small models have four parts or
more."""

SLACK = 1 << 20
"""Bytes of small tensors that stock may keep of a layer."""


def measure_quantised(request: Row) -> Row:
    """Answers to prompts of few tokens, one at a time, and the logprobs of one long
    prompt; from slots also what the loads counted, how the kernel compares with full
    residency, and on a GPU the peak of memory while layers are processed.

    Args:
        request: of `quantised.quant`.
    """
    from benchmarks.gpu.quantised_kernels import compared
    from tests.support.engine import answers, moe_layers, sampling, start
    from vllm import SamplingParams

    slots = {"slots": request["slots"]} if "slots" in request else {}
    seen: Row = {}
    with processing_watched(seen):
        llm = start(
            checkpoint(request["quantised"]),
            enable_prefix_caching=False,
            **request["options"],
            **slots,
        )
    generator = torch.Generator().manual_seed(0)

    def prompt(length: int) -> Any:
        ids = torch.randint(3, 1000, (length,), generator=generator)
        return {"prompt_token_ids": ids.tolist()}

    short = [prompt(PROMPT_TOKENS) for _ in range(3)]
    one_by_one = [
        answers(llm.generate([each], sampling(request["tokens"]), use_tqdm=False))
        for each in short
    ]
    long = prompt(request["prefill"])
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=1, prompt_logprobs=0)
    prefills = []
    for _ in range(1 if slots else STOCK_RUNS):
        (output,) = llm.generate([long], params, use_tqdm=False)
        steps = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        prefills.append([max(p.logprob for p in step.values()) for step in steps])
    assert all(math.isfinite(value) for run in prefills for value in run)
    if slots:
        llm.collective_rpc("expert_slot_residency")  # every slot holds its expert
    layers = moe_layers(llm)
    kernel = layers[0].quant_method.moe_kernel.fused_experts
    measured: Row = {
        "batch 1": one_by_one,
        "prefills": prefills,
        "kernel": type(kernel).__name__,
    }
    if slots:
        managers = [layer.slot_manager for layer in layers]
        counted = [manager.counters.as_dict() for manager in managers]
        [measured["bytes per expert"]] = {
            sum(rows[0].nbytes for rows in manager.rows.slot_rows.values())
            for manager in managers
        }
        measured["staging is shared"] = managers[0].rows.memory.staging > 0
        measured["misses"] = sum(counters["misses"] for counters in counted)
        measured["bytes loaded"] = sum(c["bytes_loaded"] for c in counted)
        measured["kernel steps"] = compared(layers[0], request["kernel_tokens"])
        measured |= seen
    return measured


def checkpoint(name: str) -> Path:
    """A small model in that format, written once; on a GPU so large that a layer shares
    its staging."""
    wide = torch.cuda.is_available()
    sizes, size_of = (SIZES, "-wide") if wide else ({}, "")
    with ExitStack() as changed:
        for name_of, size in sizes.items():
            changed.enter_context(replaced(quantised, name_of, size))
        formats = quantised.FORMATS | FP8_FORMATS
        changed.enter_context(replaced(quantised, "FORMATS", formats))
        return quantised.make_quantised(
            engine.WORK / f"quantised-{name}{size_of}", name
        )


def plain_bytes(rows: ExpertRows) -> int:
    """Bytes of the rows that share no page, so that they are torch's."""
    return sum(
        tensor.nbytes
        for tensor in rows.tensors.values()
        if not split(len(tensor), rows.num_staged, tensor[0].nbytes, rows.memory.page)[
            0
        ]
    )


@contextmanager
def processing_watched(seen: Row) -> Iterator[None]:
    """Within, the start of an engine with slots on a GPU notes what the processing of
    its layers held at most, beside what the capacity plan reserves for it, and in how
    many parts it was done. Rows are mapped memory, or so small that they are plain
    tensors; nothing else may stay."""
    if not torch.cuda.is_available():
        yield
        return
    make, measure = ExpertSlotsMixin._process_then_make_slots, start_up.measure
    peaks: list[int] = []
    left: list[int] = []
    planned: list[Any] = []
    divided: list[int] = []
    divide = parts.parts_of

    def requested(moment: str) -> int:
        """Bytes of tensors, without what the allocator rounds up."""
        return torch.cuda.memory_stats()[f"requested_bytes.all.{moment}"]

    def watched(self: Any, layer: torch.nn.Module) -> None:
        torch.cuda.reset_peak_memory_stats()
        before = requested("current")
        make(self, layer)
        plain = plain_bytes(self.slot_manager.rows)
        peaks.append(requested("peak") - before - plain)
        gc.collect()
        left.append(requested("current") - before - plain)

    def noted(layer: Any) -> list[range]:
        divided.append(len(found := divide(layer)))
        return found

    def measured(*args: Any, **kwargs: Any) -> Any:
        planned.append(measure(*args, **kwargs))
        return planned[-1]

    with (
        replaced(ExpertSlotsMixin, "_process_then_make_slots", watched),
        replaced(start_up, "measure", measured),
        replaced(parts, "PART_BYTES", PART_BYTES),
        replaced(parts, "parts_of", noted),
    ):
        yield
    seen["processing"] = {"processing within the plan": False}
    if not peaks or not planned:
        return
    [footprint] = planned[-1].footprints
    reserved = max(layer.processing_bytes for layer in footprint.layers)
    seen["processing"] = {
        "MB of processing": max(peaks) / 1e6,
        "MB planned for it": reserved / 1e6,
        "parts of a layer": max(divided, default=0),
        "processing within the plan": max(peaks) <= reserved + SLACK
        and max(left) <= SLACK,
    }
