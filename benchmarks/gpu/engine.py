# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""One engine in a process of its own, so that the next engine finds the memory free.

Usage: python -m benchmarks.gpu.engine REQUEST FILE. The request is a JSON object, as
`run_engines` gets it. What was measured is written to the file, as JSON.
"""

import functools
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from threading import Timer
from typing import Any

import psutil
import torch

from benchmarks.gpu.watch import NOT_SEEN, parts_of, watch_loading
from benchmarks.results import Row
from benchmarks.routing.odds import STRATEGIES, draw
from benchmarks.routing.strategy import register
from tests.support import ROOT

WORK = ROOT / ".demo" / "gpu_proof"
LOGS = WORK / "logs"
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
LOGGED = 20
"""Lines of a failed engine's log that are printed."""

ERROR = re.compile(r"(\[rank\d+\]:\s*)?[\w.]*(Error|Exception)\b")
"""How the line of a log begins that says why a process ended."""

DRAWN, LARGEST = (1 << 24) - 3, 0.05
"""Values of dummy tensors that are drawn, up to `LARGEST`; the rest are copies. The
number is a prime, so that no two experts of a layer are alike."""

ENDING_SECONDS = 20
"""An engine that has answered ends within so many."""

COUNTED = (
    *("needed", "hits", "loads", "bytes_loaded", "staged", "staged_steps"),
    *("overflow_steps", "steps"),
)


def run_engine(request: Row, seconds: float = 480) -> Row:
    """What one engine measured within so many seconds, or under "failed" the error. Its
    log is kept in `LOGS`."""
    environment = ENVIRONMENT | dict(os.environ) | request.get("environment", {})
    if "routing" in request:
        environment["VLLM_MOE_ROUTING_SIMULATION_STRATEGY"] = request["routing"]
    LOGS.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^A-Za-z0-9]+", "-", request.get("name", "engine"))
    answer, log = LOGS / f"{name}.json", LOGS / f"{name}.log"
    answer.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu.engine", json.dumps(request)]
    why = ""
    with log.open("w") as file:
        process = psutil.Popen(
            [*command, str(answer)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=ROOT,
        )
        try:
            process.wait(seconds)
        except psutil.TimeoutExpired:
            why = f"no answer within {seconds:.0f} s"
            for each in [*process.children(recursive=True), process]:
                each.kill()
            process.wait()
    if answer.exists():  # however the process ended afterwards
        return json.loads(answer.read_text())
    lines = [line for line in log.read_text().splitlines() if line.strip()]
    print(*lines[-LOGGED:], sep="\n")
    errors = [line for line in lines if ERROR.match(line)]
    return {"failed": (why or (errors or lines or ["no output"])[-1])[:300]}


def measure(request: Row, keep: Callable[[Row], None]) -> Row:
    """Times of decode and prefill steps and of a served load, and what they counted.
    These are given to `keep` before a profiler, which may end the process, tells where
    the time goes."""
    from vllm import LLM, SamplingParams

    register()
    measured: Row = {"decode": {}, "prefill": {}, "parts": {}, "draw_ms": {}}
    if torch.cuda.is_available():
        slots = request["options"].get("additional_config", {}).get("moe_gpu_prefetch")
        if slots is not None and slots < request["model"]["experts"]:
            measured["memory"] = dict(NOT_SEEN)
        watch_loading(measured)
    fill_alike()
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
        requests: int,
        prompt: int,
        tokens: int,
        decode: bool = False,
        into: Row | None = None,
    ) -> Counter[str]:
        """What it took and what it counted; of the decode steps alone if asked. Where
        the time goes is put `into` a row, which takes time itself."""
        sampling = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        for ids in torch.randint(
            3, 1000, (requests, prompt), generator=generator
        ).tolist():
            engine.add_request(str(next(number)), {"prompt_token_ids": ids}, sampling)
        while decode and not engine.step():
            pass

        def finish() -> None:
            while engine.has_unfinished_requests():
                engine.step()

        before = counters(llm, request["options"])
        begin = time.perf_counter()
        if into is not None:
            into |= parts_of(finish, tokens - decode)
        finish()
        moved = Counter(ms=(time.perf_counter() - begin) * 1e3)
        moved.update(counters(llm, request["options"]))
        moved.subtract(before)
        return moved

    tokens, gpu = request["tokens"], torch.cuda.is_available()
    for batch in request["batches"]:
        run(batch, 16, 8)
        steps = [run(batch, 16, tokens + 1, decode=True) for _ in range(3)]
        measured["decode"][str(batch)] = per_step(steps, tokens)
    for length in request["prefills"]:
        run(1, length, 1)
        steps = [run(1, length, 1) for _ in range(3)]
        measured["prefill"][str(length)] = per_step(steps, 1)
    measured["answers"] = answered(llm)
    if serving := request.get("serving"):
        requests, prompt, out = serving
        run(requests, prompt, 4)
        measured["served"] = per_step([run(requests, prompt, out)], 1)
        measured["tokens_per_s"] = (
            requests * (prompt + out) / measured["served"]["ms"] * 1e3
        )
    keep(measured)
    # What a profiler leaves attached is not timed.
    for batch in request["batches"] if gpu else ():
        measured["draw_ms"][str(batch)] = draw_ms(request, batch)
    for batch in request["batches"] if request["profiled"] else ():
        parts = measured["parts"].setdefault(f"decode, batch {batch}", {})
        run(batch, 16, 9, decode=True, into=parts)
    for length in request["prefills"] if request["profiled"] else ():
        parts = measured["parts"].setdefault(f"prefill {length}", {})
        run(1, length, 1, into=parts)
    return measured


def answered(llm: Any) -> list[Any]:
    """Token ids and logprobs of a few requests together."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0, max_tokens=8, logprobs=1, ignore_eos=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": list(range(3, 13 + 9 * n))} for n in range(4)]
    return [
        [output.outputs[0].token_ids, output.outputs[0].cumulative_logprob]
        for output in llm.generate(prompts, sampling, use_tqdm=False)
    ]


def fill_alike() -> None:
    """Has dummy tensors made from a few random values, the same on every device, so
    that an engine whose experts are in host memory computes with stock's values. They
    are larger than stock's, which leave no trace of an expert in an answer. And stock
    draws in one thread there, which takes two seconds for a GiB."""
    from vllm.model_executor.model_loader import dummy_loader

    fill = dummy_loader.initialize_single_dummy_weight
    generator = torch.Generator().manual_seed(0)
    drawn = torch.empty(DRAWN).uniform_(-LARGEST, LARGEST, generator=generator)

    def filled(parameter: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        kind = parameter.dtype
        numbers = kind.is_floating_point and kind.itemsize > 1
        if not numbers or not parameter.is_contiguous():
            fill(parameter, *args, **kwargs)
        elif parameter.dim() == 1:  # of a norm
            parameter.data.fill_(1)
        else:
            values = drawn[: parameter.numel()].to(parameter.device, kind)
            for part in parameter.data.view(-1).split(DRAWN):
                part.copy_(values[: len(part)])

    dummy_loader.initialize_single_dummy_weight = filled


def draw_ms(request: Row, batch: int) -> float:
    """What drawing the experts of a step costs, which no real model does."""
    from benchmarks.gpu.micro import microseconds

    shape, odds = request["model"], STRATEGIES[request["routing"]]
    rows = torch.arange(1, batch + 1, device="cuda")
    one = functools.partial(draw, odds, rows, rows, 0, shape["experts"], shape["top_k"])
    return microseconds(one, 20) * shape["layers"] / 1e3


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


def measured_by(
    request: Row, keep: Callable[[Row], None] = lambda measured: None
) -> Row:
    """What an engine as `request` describes it measures; `keep` may get a part of it
    before."""
    if "exact" in request:
        from benchmarks.gpu.exact import measure_exact

        return measure_exact(request)
    if "quantised" in request:
        from benchmarks.gpu.quantised_engine import measure_quantised

        return measure_quantised(request)
    return measure(request, keep)


def main() -> None:
    request, answer = json.loads(sys.argv[1]), Path(sys.argv[2])
    whole = answer.with_suffix(".unfinished")

    def keep(measured: Row) -> None:
        whole.write_text(json.dumps(measured))
        whole.rename(answer)

    keep(measured_by(request, keep))
    end = Timer(ENDING_SECONDS, os._exit, (0,))
    end.daemon = True
    end.start()


if __name__ == "__main__":
    main()
