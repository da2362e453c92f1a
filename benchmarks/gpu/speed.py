# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Speed as a ratio to stock, with what bounds it and where it goes; and the grid of the
proposal."""

import statistics

import torch

from benchmarks.gpu.micro import link_bytes_per_ms
from benchmarks.gpu.runs import TINY, Options, run_engines, slots_option
from benchmarks.results import Row

ROUTINGS = ("topics-qwen3", "uniform")
"""That of the model whose shapes `speed` has, and the low end. `topics-qwen1.5` hits
little more than `uniform`."""

PROPOSED = {16: 21.71, 32: 33.86, 64: 56.51, 72: 60.31}
"""Tokens/s by N in the table of vLLM issue #41447, at a GPU memory utilisation of
0.95."""

ALL_RESIDENT = 60 << 30
"""A GPU that holds all experts of `grid`, which is stock then."""

STOCK = "stock, resident"

CHECKS = {"result": "ok", "experts stayed off": True, "memory as planned": True}
"""What these columns must say."""

ON_A_GPU: Row = {
    **{"attention_backend": "TRITON_ATTN", "moe_backend": "triton"},
    "kv_cache_memory_bytes": 4 << 30,
}
NO_GRAPHS: Row = {"enforce_eager": True}


def speed(options: Options) -> list[Row]:
    """Decode and prefill at the expert shapes of Qwen3-30B-A3B. Stock is measured first
    and last, which shows how far the machine drifts meanwhile."""
    shape = {
        **{"hidden": 2048, "width": 768, "experts": 128, "top_k": 8},
        **{"heads": 32, "head_dim": 128},
    }
    batches, prefills, tokens = [1, 8, 16, 32], [100, 2000, 16000], 48
    all_slots: tuple[int, ...] = (96, 127, 16, 48, 128)
    half, quarter, common = 64, 32, ON_A_GPU
    if options.cpu:
        shape, all_slots, half, quarter = TINY, (), 31, 8
        batches, prefills, tokens, common = [1, 4], [100], 8, NO_GRAPHS
    else:
        shape["layers"] = layers_here()
    engines: dict[str, Row] = {
        STOCK: {},
        f"N = {half}": slots_option(half),
        f"N = {quarter}": slots_option(quarter),
    }
    first = list(engines)
    if not options.cpu:
        engines["stock, UVA experts"] = {
            **{"offload_backend": "uva", "cpu_offload_gb": 64},
            "cpu_offload_params": ["routed_experts"],
        }
        engines["stock, prefetch offload"] = {
            **{"offload_backend": "prefetch", "offload_group_size": 1},
            **{"offload_num_in_group": 1, "offload_params": ["routed_experts"]},
            "offload_prefetch_step": 2,
        }
        engines[f"N = {half}, no graphs"] = slots_option(half) | NO_GRAPHS
        engines[f"{STOCK}, no graphs"] = NO_GRAPHS
    engines |= {f"N = {slots}": slots_option(slots) for slots in all_slots}
    engines[f"{STOCK}, again"] = {}
    rate = 0.0 if options.cpu else link_bytes_per_ms()
    requests = [
        {
            "name": ", ".join((name, routing, f"engine {take}")),
            **{"engine": name, "model": shape, "routing": routing, "batches": batches},
            # Stock reads the experts of a long prompt from the host many times.
            **{"tokens": tokens, "profiled": name in first},
            "prefills": prefills[:2] if "UVA" in name else prefills,
            **{"max_model_len": max(prefills) + 128, "max_num_seqs": max(batches)},
            **{"first": name in first and routing == ROUTINGS[0]},
            "options": common | of_engine,
        }
        for take in range(1, options.engines + 1)
        for routing in ROUTINGS
        for name, of_engine in engines.items()
    ]

    def rows_of(request: Row, done: list[Row]) -> list[Row]:
        """Of all engines of an arm, at the place of the first."""
        arms = [
            [
                each["measured"]
                for each in done
                if each["engine"] == name and each["routing"] == request["routing"]
            ]
            for name in (request["engine"], STOCK)
        ]
        if request["measured"] is not arms[0][0]:
            return []
        return speed_rows(request["engine"], request["routing"], *arms, rate)

    return run_engines("speed", requests, rows_of, options)


def layers_here() -> int:
    """So many layers that stock's experts take two fifths of the GPU, at most 12. With
    few, a step may be shorter than what the host does for it: "GPU ms" is without the
    host."""
    of_layer = 128 * 3 * 2048 * 768 * 2
    total = torch.cuda.get_device_properties(0).total_memory
    return min(12, int(0.4 * total / of_layer))


def speed_rows(
    name: str, routing: str, engines: list[Row], resident: list[Row], rate: float
) -> list[Row]:
    """One row a batch size or prompt length: medians of the engines of an arm. The
    bound is the resident step and, at the rate of the link in bytes/ms, the bytes of
    its misses. Inductor may choose other kernels in another process, which round in
    another way, so equal answers are shown and not demanded: `exact` does."""
    head = {"engine": name, "routing": routing}
    rows = [
        {**head, "result": f"failed: {engine['failed']}"}
        for engine in engines
        if "failed" in engine
    ]
    engines = [engine for engine in engines if "failed" not in engine]
    resident = [engine for engine in resident if "failed" not in engine]
    for kind in ("decode", "prefill"):
        for size in engines[0][kind] if engines else ():
            steps = [engine[kind][size] for engine in engines]
            step = {key: statistics.median(s[key] for s in steps) for key in steps[0]}
            tokens = int(size)
            what = f"decode, batch {size}" if kind == "decode" else f"prefill {size}"
            row = {**head, "what": what, "ms": step["ms"]}
            if len(steps) > 1:
                times = [each["ms"] for each in steps]
                row["range"] = f"{min(times):.3g} to {max(times):.3g}"
            row["tokens/s"] = tokens / step["ms"] * 1e3
            if resident:
                stock = statistics.median(each[kind][size]["ms"] for each in resident)
                row["of stock"] = stock / step["ms"]
                if drawn := engines[0].get("draw_ms", {}).get(size, 0):
                    # Which both do, and no real model.
                    row["draw ms"] = drawn
                    row["without it"] = (stock - drawn) / (step["ms"] - drawn)
            if step.get("needed"):
                row |= counted(step)
                if rate and resident:
                    bound = stock + step["bytes_loaded"] / rate
                    row |= {"bound ms": bound, "of bound": step["ms"] / bound}
            row |= engines[0].get("parts", {}).get(what, {})
            rows.append(row)
    if engines:
        row = {**head, "what": "the engine", **engines[0].get("memory", {})}
        if resident and "answers" in engines[0]:
            row["answers as stock's"] = engines[0]["answers"] == resident[0]["answers"]
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


def grid(options: Options) -> list[Row]:
    """vLLM issue #41447: 16 requests of 64+64 tokens at the expert shapes of
    gemma-4-26B-A4B, beside the figures of the proposal."""
    shape = {
        **{"hidden": 2816, "width": 704, "experts": 128, "top_k": 8},
        **{"heads": 16, "head_dim": 128, "layers": 30},
    }
    all_slots, serving, proposed = (64, 32, 16, 72, 96), (16, 64, 64), PROPOSED
    common = ON_A_GPU
    if options.cpu:
        shape, all_slots, serving, proposed = TINY, (8, 24), (4, 16, 8), {}
        common = NO_GRAPHS
    elif torch.cuda.get_device_properties(0).total_memory > ALL_RESIDENT:
        all_slots += (shape["experts"],)
    requests = [
        {
            **{"name": f"N = {slots}, {routing}", "model": shape, "routing": routing},
            **{"batches": [], "tokens": 0, "prefills": [], "serving": list(serving)},
            "profiled": False,
            **{"max_model_len": 4096, "max_num_seqs": serving[0]},
            "options": common | slots_option(slots),
        }
        for routing in ROUTINGS
        for slots in all_slots
    ]

    def rows_of(request: Row, done: list[Row]) -> list[Row]:
        measured = request["measured"]
        slots = request["options"]["additional_config"]["moe_gpu_prefetch"]
        row = {
            **{"N": slots, "routing": request["routing"], "layers": shape["layers"]},
            "tokens/s": measured.get("tokens_per_s", ""),
            "the proposal's, at 0.95": proposed.get(slots, ""),
        }
        if "failed" in measured:
            row["result"] = f"failed: {measured['failed']}"
        if "served" in measured:
            row |= counted(measured["served"])
        return [row | measured.get("memory", {})]

    return run_engines("grid", requests, rows_of, options)
