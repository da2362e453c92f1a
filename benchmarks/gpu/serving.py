# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What whole engines show: answers equal to stock's, speed as a ratio to stock, and the
grid of the proposal."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import results
from benchmarks.gpu.engine import COUNTED, WORK, run_engine
from benchmarks.gpu.micro import link_bytes_per_ms
from benchmarks.results import Row

ENGINES_SECONDS = 400
"""No engine is started later than this into a step: one takes a minute or so."""

ROUTINGS = ("uniform", "topics-qwen3")
"""The low end, and the model whose shapes `speed` has. `topics-qwen1.5` hits little
more than `uniform`."""

TINY = {
    **{"hidden": 128, "width": 64, "experts": 32, "top_k": 4},
    **{"heads": 4, "head_dim": 32, "layers": 2},
}
"""The model of `--cpu`."""

PROPOSED = {16: 21.71, 32: 33.86, 64: 56.51, 72: 60.31}
"""Tokens/s by N in the table of vLLM issue #41447, at a GPU memory utilisation of
0.95."""

STOCK = "stock, resident"
console = Console()


def results_folder() -> Path:
    """What a CPU measures says nothing about a GPU, and is not among the results."""
    gpu = torch.cuda.is_available()
    return results.folder(results.RESULTS if gpu else WORK / "results")


def run_engines(
    step: str, requests: list[Row], rows_of: Callable[[Row, list[Row]], list[Row]]
) -> list[Row]:
    """Runs the engines that have not been measured yet, while there is time. What was
    measured is kept after each of them.

    Args:
        step: its name.
        requests: one of an engine each.
        rows_of: the rows of a request, whose measurement is under "measured", given all
            requests that have one.
    """
    begin = time.monotonic()
    kept = results_folder() / "raw" / f"{step}.json"
    done: list[Row] = json.loads(kept.read_text()) if kept.exists() else []
    for request in requests:
        if any(request.items() <= earlier.items() for earlier in done):
            continue
        if time.monotonic() - begin > ENGINES_SECONDS:
            console.print(
                f"no time for {request['name']} and those after it: run {step} again"
            )
            break
        done.append({**request, "measured": run_engine(request)})
        kept.write_text(json.dumps(done, indent=1) + "\n")
        console.print(f"{request['name']} {request.get('routing', '')}: measured")
    return [row for request in done for row in rows_of(request, done)]


def slots_option(slots: int) -> Row:
    return {"additional_config": {"moe_gpu_prefetch": slots}}


def exact(cpu: bool) -> list[Row]:
    """One row for each number of slots: whether token ids and logprobs are stock's."""
    common: Row = {"enforce_eager": cpu}
    if not cpu:
        common |= {"attention_backend": "TRITON_ATTN", "gpu_memory_utilization": 0.3}
    engines: dict[str, Row] = {"stock": {} if cpu else {"moe_backend": "triton"}}
    for slots, policy in ((4, "lru"), (8, "lfu"), (16, "lru"), (31, "lru")):
        engines[f"N = {slots} of 32, {policy}"] = {"slots": slots, "policy": policy}
    requests = [
        {"name": f"{dtype}, {name}", "exact": {"dtype": dtype, **common, **options}}
        for dtype in (("bfloat16",) if cpu else ("bfloat16", "float16"))
        for name, options in engines.items()
    ]

    def rows_of(request: Row, done: list[Row]) -> list[Row]:
        dtype, _, name = request["name"].partition(", ")
        stock = next(d["measured"] for d in done if d["name"] == f"{dtype}, stock")
        measured = request["measured"]
        if name == "stock" and "outputs" in measured:
            return []
        row = {
            "dtype": dtype,
            "engine": name,
            "graphs": "no" if cpu else "FULL_AND_PIECEWISE",
        }
        if "failed" in measured or "failed" in stock:
            why = measured.get("failed", "stock failed")
            return [{**row, "equal to stock": False, "failed": why}]
        equal = measured["outputs"] == stock["outputs"]
        return [{**row, "equal to stock": equal, **{n: measured[n] for n in COUNTED}}]

    return run_engines("exact", requests, rows_of)


def speed(cpu: bool) -> list[Row]:
    """Decode and prefill at the expert shapes of Qwen3-30B-A3B. Stock is measured first
    and last, which shows how far the machine drifts meanwhile."""
    shape = {
        **{"hidden": 2048, "width": 768, "experts": 128, "top_k": 8},
        **{"heads": 32, "head_dim": 128, "layers": 6},
    }
    batches, prefills, tokens = [1, 8, 32], [100, 2000, 16000], 64
    all_slots: tuple[int, ...] = (128, 127, 96, 64, 48, 32, 16)
    common: Row = {"attention_backend": "TRITON_ATTN", "moe_backend": "triton"}
    if cpu:
        shape = TINY
        batches, prefills, tokens, all_slots = [1, 4], [100], 8, (31, 8)
        common = {"enforce_eager": True}
    engines: dict[str, Row] = {STOCK: {}}
    if not cpu:
        engines["stock, UVA experts"] = {
            **{"offload_backend": "uva", "cpu_offload_gb": 64},
            "cpu_offload_params": ["routed_experts"],
        }
        engines["stock, prefetch offload"] = {
            **{"offload_backend": "prefetch", "offload_group_size": 1},
            **{"offload_num_in_group": 1, "offload_params": ["routed_experts"]},
        }
    engines |= {f"N = {slots}": slots_option(slots) for slots in all_slots}
    engines[f"{STOCK}, again"] = {}
    rate = 0.0 if cpu else link_bytes_per_ms()
    requests = [
        {
            **{"name": name, "model": shape, "routing": strategy, "batches": batches},
            **{"tokens": tokens, "prefills": prefills},
            **{"max_model_len": max(prefills) + 128, "max_num_seqs": max(batches)},
            "options": common | options,
        }
        for strategy in ROUTINGS
        for name, options in engines.items()
    ]

    def rows_of(request: Row, done: list[Row]) -> list[Row]:
        name, strategy = request["name"], request["routing"]
        resident = next(d["measured"] for d in done if d["routing"] == strategy)
        return speed_rows(name, strategy, request["measured"], resident, rate)

    return run_engines("speed", requests, rows_of)


def speed_rows(
    name: str, strategy: str, measured: Row, resident: Row, rate: float
) -> list[Row]:
    """One row a batch size or prompt length. The bound is the resident step and, at the
    rate of the link in bytes/ms, the bytes of its misses."""
    head = {"engine": name, "routing": strategy}
    if "failed" in measured:
        return [{**head, "what": f"failed: {measured['failed']}"}]
    rows = []
    for kind in ("decode", "prefill"):
        for size, step in measured[kind].items():
            what = f"decode, batch {size}" if kind == "decode" else f"prefill {size}"
            stock = resident[kind][size]["ms"] if kind in resident else float("nan")
            row = {**head, "what": what, "ms": step["ms"]}
            row["of stock"] = stock / step["ms"]
            if step.get("needed"):
                row |= counted(step)
                if rate:
                    bound = stock + step["bytes_loaded"] / rate
                    row |= {"bound ms": bound, "of bound": step["ms"] / bound}
            rows.append(row)
    return rows


def counted(step: Row) -> Row:
    """What the counters of all layers say of a step of the model."""
    return {
        "hit rate": step["hits"] / step["needed"],
        "loads": step["loads"],
        "staged": step["staged"],
        "MB": step["bytes_loaded"] / 1e6,
        "steps that staged": step["staged_steps"] / step["steps"],
        "overflow steps": step["overflow_steps"] / step["steps"],
    }


def grid(cpu: bool) -> list[Row]:
    """vLLM issue #41447: 16 requests of 64+64 tokens at the expert shapes of
    gemma-4-26B-A4B, beside the figures of the proposal."""
    shape = {
        **{"hidden": 2816, "width": 704, "experts": 128, "top_k": 8},
        **{"heads": 16, "head_dim": 128, "layers": 30},
    }
    all_slots, serving, proposed = (16, 32, 64, 72, 96), (16, 64, 64), PROPOSED
    common: Row = {"attention_backend": "TRITON_ATTN", "moe_backend": "triton"}
    if cpu:
        shape, all_slots, serving, proposed = TINY, (8, 24), (4, 16, 8), {}
        common = {"enforce_eager": True}
    requests = [
        {
            **{"name": f"N = {slots}", "model": shape, "routing": strategy},
            **{"batches": [], "tokens": 0, "prefills": [], "serving": list(serving)},
            **{"max_model_len": 4096, "max_num_seqs": serving[0]},
            "options": common | slots_option(slots),
        }
        for strategy in ROUTINGS
        for slots in all_slots
    ]

    def rows_of(request: Row, done: list[Row]) -> list[Row]:
        measured = request["measured"]
        slots = request["options"]["additional_config"]["moe_gpu_prefetch"]
        row = {
            **{"N": slots, "routing": request["routing"], "layers": shape["layers"]},
            "tokens/s": measured.get("tokens_per_s", measured.get("failed")),
            "the proposal's, at 0.95": proposed.get(slots, ""),
        }
        if "served" in measured:
            row |= counted(measured["served"])
        if "taken_gib" in measured:
            peak, kept = measured["torch_peak_gib"], measured["torch_gib"]
            row |= {"GPU GiB loaded": measured["taken_gib"], "torch's": kept}
            row |= {"torch's peak": peak, "experts stayed off": peak < kept + 0.5}
        return [row]

    return run_engines("grid", requests, rows_of)
