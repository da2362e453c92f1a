# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""One engine in a process of its own, so that the next engine finds the memory free.

Usage: python -m benchmarks.gpu.engine REQUEST, a JSON object of `serving.py`. The last
line of the output is what was measured, as JSON.
"""

import functools
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import Row
from benchmarks.routing.strategy import register
from tests.support import ROOT

WORK = ROOT / ".demo" / "gpu_proof"
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
}
COUNTED = (
    *("needed", "hits", "loads", "bytes_loaded", "staged", "staged_steps"),
    *("overflow_steps", "steps"),
)


def run_engine(request: Row) -> Row:
    """What one engine measured, or under "failed" the last line of its log."""
    environment = ENVIRONMENT | dict(os.environ)
    if "routing" in request:
        environment["VLLM_MOE_ROUTING_SIMULATION_STRATEGY"] = request["routing"]
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.engine", json.dumps(request)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        timeout=480,
    )
    if process.returncode == 0:
        return json.loads(process.stdout.splitlines()[-1])
    lines = [line for line in process.stderr.splitlines() if line.strip()]
    return {"failed": (lines or ["no output"])[-1][:300]}


def measure(request: Row) -> Row:
    """Times of decode and prefill steps and of a served load, and what they counted."""
    from vllm import LLM, SamplingParams

    register()
    measured: Row = {"decode": {}, "prefill": {}}
    if torch.cuda.is_available():
        watch_loading(measured)
    llm = LLM(
        str(make_model(request["model"])),
        load_format="dummy",
        skip_tokenizer_init=True,
        use_tqdm_on_load=False,
        enable_prefix_caching=False,
        max_model_len=request["max_model_len"],
        max_num_seqs=request["max_num_seqs"],
        **request["options"],
    )
    generator = torch.Generator().manual_seed(0)
    engine, number = llm.llm_engine, itertools.count()

    def run(
        requests: int, prompt: int, tokens: int, decode: bool = False
    ) -> Counter[str]:
        """What it took and what it counted; of the decode steps alone if asked."""
        sampling = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        for ids in torch.randint(
            3, 1000, (requests, prompt), generator=generator
        ).tolist():
            engine.add_request(str(next(number)), {"prompt_token_ids": ids}, sampling)
        while decode and not engine.step():
            pass
        before = counters(llm, request["options"])
        begin = time.perf_counter()
        while engine.has_unfinished_requests():
            engine.step()
        moved = Counter(ms=(time.perf_counter() - begin) * 1e3)
        moved.update(counters(llm, request["options"]))
        moved.subtract(before)
        return moved

    tokens = request["tokens"]
    for batch in request["batches"]:
        run(batch, 16, 8)
        steps = [run(batch, 16, tokens + 1, decode=True) for _ in range(3)]
        measured["decode"][str(batch)] = per_step(steps, tokens)
    for length in request["prefills"]:
        run(1, length, 1)
        measured["prefill"][str(length)] = per_step(
            [run(1, length, 1) for _ in range(3)], 1
        )
    if serving := request.get("serving"):
        requests, prompt, out = serving
        run(requests, prompt, 4)
        measured["served"] = per_step([run(requests, prompt, out)], 1)
        measured["tokens_per_s"] = (
            requests * (prompt + out) / measured["served"]["ms"] * 1e3
        )
    return measured


def watch_loading(measured: Row) -> None:
    """Has the next load note what the model took of GPU memory, and the peak of torch's
    part of it: the experts must never all be there. Mapped memory, where the rows lie,
    is not torch's."""
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    load_model = BaseModelLoader.load_model

    @functools.wraps(load_model)
    def watched(*args: Any, **kwargs: Any) -> Any:
        torch.cuda.reset_peak_memory_stats()
        before, _ = torch.cuda.mem_get_info()
        model = load_model(*args, **kwargs)
        gc.collect()
        torch.cuda.empty_cache()
        measured["taken_gib"] = (before - torch.cuda.mem_get_info()[0]) / (1 << 30)
        measured["torch_gib"] = torch.cuda.memory_allocated() / (1 << 30)
        measured["torch_peak_gib"] = torch.cuda.max_memory_allocated() / (1 << 30)
        return model

    BaseModelLoader.load_model = watched


def per_step(runs: list[Counter[str]], steps: int) -> Row:
    """Of runs of so many steps each: the median time of a step, and what a step
    counted."""
    moved = {
        name: sum(run[name] for run in runs) / len(runs) / steps for name in runs[0]
    }
    return {**moved, "ms": statistics.median(run["ms"] for run in runs) / steps}


def counters(llm: Any, options: Row) -> Counter[str]:
    """The totals of all layers together; empty for stock."""
    total: Counter[str] = Counter()
    if "additional_config" in options:
        for layer in llm.collective_rpc("expert_slot_counters")[0].values():
            total.update(
                {name: value for name, value in layer.items() if name in COUNTED}
            )
    return total


def make_model(shape: Row) -> Path:
    """A directory with the config of a Qwen3-MoE of `shape`. Its weights are dummies,
    so it has no others."""
    from transformers import Qwen3MoeConfig

    directory = WORK / "-".join(f"{key}{value}" for key, value in shape.items())
    config = Qwen3MoeConfig(
        vocab_size=1024,
        hidden_size=shape["hidden"],
        intermediate_size=shape["hidden"],
        moe_intermediate_size=shape["width"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=max(1, shape["heads"] // 8),
        head_dim=shape["head_dim"],
        num_experts=shape["experts"],
        num_experts_per_tok=shape["top_k"],
        norm_topk_prob=True,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        architectures=["Qwen3MoeForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(directory)
    return directory


def measure_exact(request: Row) -> Row:
    """The answers of a small checkpoint, and what was counted."""
    from tests.support.engine import run
    from tests.support.sample import make_checkpoint

    done = run(make_checkpoint(WORK / "qwen3-moe"), **request["exact"])
    return {"outputs": done.outputs, **{name: done.total(name) for name in COUNTED}}


def measured_by(request: Row) -> Row:
    """What an engine as `request` describes it measures."""
    if "exact" in request:
        return measure_exact(request)
    if "quantised" in request:
        from benchmarks.gpu.quantised_engine import measure_quantised

        return measure_quantised(request, WORK)
    return measure(request)


def main() -> None:
    request = json.loads(sys.argv[1])
    print("\n" + json.dumps(measured_by(request)))


if __name__ == "__main__":
    main()
