# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Proves and measures expert slots on a GPU, step by step. Each step ends within eight
minutes; run again, it goes on with the engines that it had no time for. Results go to
benchmarks/results/, as JSON and as a Markdown table. Not yet run on a GPU.

memory   mapped and pinned memory as the slots use it; seconds, no
         model (benchmarks/gpu/memory.py)
kernels  plan and gather against the CPU's decisions, thousands of random steps
micro    plan in µs; gather in GB/s beside the copy engine and a GEMM that reads host
         memory; launches of a step
exact    a small real checkpoint with CUDA graphs on: token ids and logprobs equal
         stock's
speed    decode and prefill at the expert shapes of Qwen3-30B-A3B, as ratios to stock
grid     vLLM issue #41447: expert shapes of gemma-4-26B-A4B, 16 requests of 64+64
         tokens
all      the six, in this order; ends after memory if that fails

On a machine without a GPU, `--cpu` runs exact, speed and grid small, to try the script
itself; what that measures says nothing about a GPU and stays out of
benchmarks/results/.
"""

import argparse
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from tests.support import ROOT

if __name__ == "__main__":  # whoever imports this keeps an environment of its own
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from rich.console import Console

from benchmarks import routing

WORK = ROOT / ".demo" / "gpu_check"
RESULTS = ROOT / "benchmarks" / "results"
ARMS_SECONDS = 400
"""No engine is started later than this into a step: one takes a minute or so."""
CHECKS = {
    "result": "ok",
    "equal to stock": True,
    "launches": 2,
    "experts stayed off": True,
}
"""What these columns must say; anything else makes the exit status 1."""

Row = dict[str, Any]
COUNTED = ("needed", "hits", "loads", "bytes_loaded", "staged", "staged_steps")
COUNTED += ("overflow_steps", "steps")
TINY = {
    **{"hidden": 128, "width": 64, "experts": 32, "top_k": 4},
    **{"heads": 4, "head_dim": 32, "layers": 2},
}
"""The model of `--cpu`."""
console = Console()


# --- arms: one engine each, in a process of its own, so that the next finds the memory
# free ---


def watch_loading(measured: Row) -> None:
    """Notes what the model took of GPU memory, and the peak of torch's part of it while
    it loads: the experts must never all be there. Mapped memory, where the rows lie, is
    not torch's."""
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    load_model = BaseModelLoader.load_model

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


def arm(request: Row) -> Row:
    """Runs one engine as `request` says and returns what it measured."""
    from vllm import LLM, SamplingParams

    routing.register()
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
        measured["decode"][str(batch)] = each(steps, tokens)
    for length in request["prefills"]:
        run(1, length, 1)
        measured["prefill"][str(length)] = each(
            [run(1, length, 1) for _ in range(3)], 1
        )
    if serving := request.get("serving"):
        requests, prompt, out = serving
        run(requests, prompt, 4)
        measured["served"] = each([run(requests, prompt, out)], 1)
        measured["tokens_per_s"] = (
            requests * (prompt + out) / measured["served"]["ms"] * 1e3
        )
    return measured


def each(runs: list[Counter[str]], steps: int) -> Row:
    """Of runs of so many steps: the median time of a step, and what a step counted."""
    moved = {
        name: sum(run[name] for run in runs) / len(runs) / steps for name in runs[0]
    }
    return {**moved, "ms": statistics.median(run["ms"] for run in runs) / steps}


def counters(llm: Any, options: Row) -> Counter[str]:
    """The totals of all layers together; nothing where there are no slots."""
    total: Counter[str] = Counter()
    if "additional_config" in options:
        for layer in llm.collective_rpc("expert_slot_counters")[0].values():
            total.update(
                {name: value for name, value in layer.items() if name in COUNTED}
            )
    return total


def exact_arm(request: Row) -> Row:
    """Runs one engine over a small checkpoint and returns its answers and counters."""
    from tests.support.engine import run
    from tests.support.sample import make_checkpoint

    done = run(make_checkpoint(WORK / "qwen3-moe"), **request["exact"])
    return {"outputs": done.outputs, **{name: done.total(name) for name in COUNTED}}


def run_arm(request: Row) -> Row:
    """`arm` in a process of its own; a failed start is a result, with the last line of
    its log."""
    environment = dict(os.environ)
    if "routing" in request:
        environment["VLLM_MOE_ROUTING_SIMULATION_STRATEGY"] = request["routing"]
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.proof", "arm", json.dumps(request)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=480,
    )
    if process.returncode == 0:
        return json.loads(process.stdout.splitlines()[-1])
    lines = [line for line in process.stderr.splitlines() if line.strip()]
    return {"failed": (lines or ["no output"])[-1][:300]}


def run_arms(
    step: str, requests: list[Row], rows_of: Callable[[Row, list[Row]], list[Row]]
) -> Any:
    """Runs the requests that have no rows yet, while there is time, saving after each
    one.

    Args:
        rows_of: (request with its measurement under "measured", all requests so far) ->
            rows.
    """
    begin = time.monotonic()
    kept = results_folder() / f"{step}-arms.json"
    done: list[Row] = json.loads(kept.read_text()) if kept.exists() else []
    done = [request for request in done if request["machine"] == machine()]
    for request in requests:
        if any(request.items() <= earlier.items() for earlier in done):
            continue
        if time.monotonic() - begin > ARMS_SECONDS:
            console.print(
                f"no time for {request['name']} and those after it: run {step} again"
            )
            break
        done.append({**request, "measured": run_arm(request), "machine": machine()})
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(done))
        console.print(f"{request['name']} {request.get('routing', '')}: measured")
    return [row for request in done for row in rows_of(request, done)]


def make_model(shape: Row) -> Path:
    """A directory with the config of a Qwen3-MoE of `shape`; the weights are
    dummies."""
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


def slots_option(slots: int) -> Row:
    return {"additional_config": {"moe_gpu_prefetch": slots}}


# --- the steps ---


def device_memory() -> Any:
    from vllm.model_executor.layers.fused_moe.expert_slots.cuda.backend import (
        CudaBackend,
    )

    torch.zeros(1, device="cuda")  # makes the context
    return CudaBackend().memory(torch.device("cuda"))


def memory(cpu: bool) -> list[Row]:
    from benchmarks.gpu import memory as memory_checks
    from vllm.model_executor.layers.fused_moe.expert_slots.weights.driver import (
        cuda_driver,
    )

    torch.zeros(1, device="cuda")  # makes the context
    return memory_checks.run(
        memory_checks.Machine(cuda_driver(), torch.cuda.current_device())
    )


def kernels(cpu: bool) -> list[Row]:
    from tests.support import pair

    rows = []
    for experts, slots, top_k in (
        (128, 64, 8),
        (128, 16, 8),
        (60, 15, 4),
        (512, 300, 16),
    ):
        for policy in ("lru", "lfu"):
            both = pair.Pair(
                experts, slots, policy, half_life=64, memory=device_memory()
            )
            generator = torch.Generator().manual_seed(slots)
            steps = 600
            for step in range(steps):
                tokens = 600 if step % 100 == 99 else 1 + step % 5
                ids = pair.routing(generator, tokens, experts, top_k, 0.1)
                mask = (
                    torch.rand(tokens, generator=generator) < 0.2
                    if step % 3 == 0
                    else None
                )
                both.step((ids + step // 50) % experts, mask)
            counted = both.device.counters.as_dict()
            rows.append(
                {
                    **{"E": experts, "N": slots, "top-k": top_k, "policy": policy},
                    **{"equal steps": steps, "staged steps": counted["staged_steps"]},
                }
            )
    return rows


def microseconds(launch: Callable[[], Any], repeat: int = 200) -> float:
    """Time of one launch inside a CUDA graph of `repeat` of them."""
    launch()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeat):
            launch()
    graph.replay()
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / repeat * 1e3


def launches(step: Callable[[], Any]) -> int:
    """Nodes of a CUDA graph of one step."""
    from vllm.model_executor.layers.fused_moe.expert_slots.weights.driver import (
        cuda_driver,
    )

    step()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        step()
    driver = cuda_driver()
    handle = driver.module.CUgraph(graph.raw_cuda_graph())
    return driver.call("cuGraphGetNodes", handle, 0)[1]


def micro(cpu: bool) -> list[Row]:
    from tests.support.pair import make_rows
    from vllm.model_executor.layers.fused_moe.expert_slots.config import (
        MoEPrefetchConfig,
    )
    from vllm.model_executor.layers.fused_moe.expert_slots.cuda.manager import (
        CudaSlotManager,
    )
    from vllm.model_executor.layers.fused_moe.expert_slots.weights.host_pages import (
        host_tensor,
    )
    from vllm.model_executor.layers.fused_moe.expert_slots.weights.store import (
        ExpertStore,
    )

    hidden, width, experts = 2048, 768, 128
    shapes = {"w13_weight": (2 * width, hidden), "w2_weight": (hidden, width)}
    tensors = {
        name: host_tensor((experts, *shape), torch.bfloat16)
        for name, shape in shapes.items()
    }
    store, memory = ExpertStore(tensors), device_memory()

    def make_manager(slots: int, policy: str) -> CudaSlotManager:
        config = MoEPrefetchConfig(slots=slots, policy=policy)
        return CudaSlotManager(config, make_rows(store, slots, memory))

    rows: list[Row] = []
    for policy in ("lru", "lfu"):
        manager = make_manager(64, policy)
        for tokens in (1, 8, 64, 8192):
            ids = torch.rand(tokens, experts, device="cuda").topk(8).indices.int()
            hits = torch.arange(8, device="cuda", dtype=torch.int32).repeat(tokens, 1)
            for what, routed in (("all hits", hits), ("random ids", ids)):
                spent = microseconds(partial(manager.plan, routed))
                rows.append(
                    {"what": f"plan, {policy}, {tokens} tokens, {what}", "µs": spent}
                )

    # With eight slots, two sets of eight experts evict each other, and of 64 experts 56
    # are staged.
    manager = make_manager(8, "lru")
    every = torch.arange(experts, device="cuda", dtype=torch.int32)
    misses = [every[16:24].view(1, 8), every[24:32].view(1, 8)]
    staged = [every[:64].view(8, 8), every[64:].view(8, 8)]
    hits = [every[:8].view(1, 8)]
    for what, sets in (
        ("all hit", hits),
        ("8 experts", misses),
        ("64, 56 of them staged", staged),
    ):

        def plan(sets: list[torch.Tensor] = sets) -> None:
            sets.reverse()
            manager.plan(sets[0])

        def step(sets: list[torch.Tensor] = sets) -> None:
            sets.reverse()
            manager.step(sets[0])

        planned = microseconds(plan, 40)
        manager.reset()
        spent = microseconds(step, 40) - planned
        totals = manager.counters.as_dict()
        size = totals["bytes_loaded"] / totals["steps"]
        row = {"what": f"gather, {what}", "µs": spent, "GB/s": size / spent / 1e3}
        rows.append(row | {"launches": launches(step)})

    targets = {
        name: torch.empty_like(t[:8], device="cuda") for name, t in tensors.items()
    }

    def copy() -> None:
        for name, tensor in tensors.items():
            targets[name].copy_(tensor[16:24], non_blocking=True)

    spent, size = microseconds(copy, 20), 8 * store.bytes_per_expert
    rows.append(
        {"what": "copy engine, 8 experts", "µs": spent, "GB/s": size / spent / 1e3}
    )

    from vllm.utils.torch_utils import get_accelerator_view_from_cpu_tensor

    view = get_accelerator_view_from_cpu_tensor(tensors["w13_weight"])[:8].flatten(0, 1)
    x = torch.zeros(16, hidden, dtype=torch.bfloat16, device="cuda")
    spent, size = microseconds(lambda: x @ view.T, 20), view.nbytes
    rows.append(
        {"what": "GEMM on host memory", "µs": spent, "GB/s": size / spent / 1e3}
    )
    return rows


def exact(cpu: bool) -> list[Row]:
    common: Row = {"enforce_eager": cpu}
    if not cpu:
        common |= {"attention_backend": "TRITON_ATTN", "gpu_memory_utilization": 0.3}
    arms: dict[str, Row] = {"stock": {} if cpu else {"moe_backend": "triton"}}
    for slots, policy in ((4, "lru"), (8, "lfu"), (16, "lru"), (31, "lru")):
        arms[f"N = {slots} of 32, {policy}"] = {"slots": slots, "policy": policy}
    requests = [
        {"name": f"{dtype}, {name}", "exact": {"dtype": dtype, **common, **options}}
        for dtype in (("bfloat16",) if cpu else ("bfloat16", "float16"))
        for name, options in arms.items()
    ]

    def rows_of(request: Row, done: list[Row]) -> list[Row]:
        dtype, _, name = request["name"].partition(", ")
        stock = next(d["measured"] for d in done if d["name"] == f"{dtype}, stock")
        measured = request["measured"]
        if name == "stock" and "outputs" in measured:
            return []
        row = {
            "dtype": dtype,
            "arm": name,
            "graphs": "no" if cpu else "FULL_AND_PIECEWISE",
        }
        if "failed" in measured or "failed" in stock:
            why = measured.get("failed", "stock failed")
            return [{**row, "equal to stock": False, "failed": why}]
        equal = measured["outputs"] == stock["outputs"]
        return [{**row, "equal to stock": equal, **{n: measured[n] for n in COUNTED}}]

    return run_arms("exact", requests, rows_of)


def bus_bytes_per_ms() -> float:
    """What the copy engine reaches from pinned memory."""
    home = torch.empty(1 << 28, dtype=torch.uint8).pin_memory()
    target = torch.empty_like(home, device="cuda")
    return (
        home.numel()
        / microseconds(lambda: target.copy_(home, non_blocking=True), 8)
        * 1e3
    )


def speed(cpu: bool) -> list[Row]:
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
    offload = {"offload_backend": "uva", "cpu_offload_gb": 64}
    prefetch = {
        "offload_backend": "prefetch",
        "offload_group_size": 1,
        "offload_num_in_group": 1,
    }
    arms: dict[str, Row] = {"stock, resident": {}}
    if not cpu:
        arms["stock, UVA experts"] = offload | {
            "cpu_offload_params": ["routed_experts"]
        }
        arms["stock, prefetch offload"] = prefetch | {
            "offload_params": ["routed_experts"]
        }
    arms |= {f"N = {slots}": slots_option(slots) for slots in all_slots}
    rate = 0.0 if cpu else bus_bytes_per_ms()
    requests = [
        {
            **{"name": name, "model": shape, "routing": strategy, "batches": batches},
            **{
                "tokens": tokens,
                "prefills": prefills,
                "max_model_len": max(prefills) + 128,
            },
            **{"max_num_seqs": max(batches), "options": common | options},
        }
        for strategy in routing.STRATEGIES
        for name, options in arms.items()
    ]

    def rows_of(request: Row, done: list[Row]) -> list[Row]:
        resident = next(d for d in done if d["routing"] == request["routing"])[
            "measured"
        ]
        measured = request["measured"]
        return speed_rows(request["name"], request["routing"], measured, resident, rate)

    return run_arms("speed", requests, rows_of)


def speed_rows(
    arm_name: str, strategy: str, measured: Row, resident: Row, rate: float
) -> list[Row]:
    """One row a batch size or prompt length; the bound is the resident step plus its
    misses' bytes at the rate of the bus."""
    head = {"arm": arm_name, "routing": strategy}
    if "failed" in measured:
        return [{**head, "what": f"failed: {measured['failed']}"}]
    rows = []
    for kind in ("decode", "prefill"):
        for size, step in measured[kind].items():
            what = f"decode, batch {size}" if kind == "decode" else f"prefill {size}"
            stock = resident[kind][size]["ms"] if kind in resident else float("nan")
            row = {
                **head,
                "what": what,
                "ms": step["ms"],
                "of stock": stock / step["ms"],
            }
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
    shape = {
        "hidden": 2816,
        "width": 704,
        "experts": 128,
        "top_k": 8,
        "heads": 16,
        "head_dim": 128,
        "layers": 30,
    }
    all_slots, serving = (16, 32, 64, 72, 96), (16, 64, 64)
    common: Row = {"attention_backend": "TRITON_ATTN", "moe_backend": "triton"}
    if cpu:
        shape = TINY
        all_slots, serving, common = (8, 24), (4, 16, 8), {"enforce_eager": True}
    published = {} if cpu else {16: 21.71, 32: 33.86, 64: 56.51, 72: 60.31}
    requests = [
        {
            **{
                "name": f"N = {slots}",
                "model": shape,
                "routing": strategy,
                "batches": [],
            },
            **{
                "tokens": 0,
                "prefills": [],
                "max_model_len": 4096,
                "serving": list(serving),
            },
            **{"max_num_seqs": serving[0], "options": common | slots_option(slots)},
        }
        for strategy in routing.STRATEGIES
        for slots in all_slots
    ]

    def rows_of(request: Row, done: list[Row]) -> list[Row]:
        measured = request["measured"]
        slots = request["options"]["additional_config"]["moe_gpu_prefetch"]
        row = {
            **{"N": slots, "routing": request["routing"], "layers": shape["layers"]},
            "tokens/s": measured.get("tokens_per_s", measured.get("failed")),
            "the proposal's, at 0.95": published.get(slots, ""),
        }
        if "served" in measured:
            row |= counted(measured["served"])
        if "taken_gib" in measured:
            row |= {
                "GPU GiB loaded": measured["taken_gib"],
                "torch's": measured["torch_gib"],
                "torch's peak": measured["torch_peak_gib"],
                "experts stayed off": measured["torch_peak_gib"]
                < measured["torch_gib"] + 0.5,
            }
        return [row]

    return run_arms("grid", requests, rows_of)


STEPS = {step.__name__: step for step in (memory, kernels, micro, exact, speed, grid)}


NEEDS_GPU = ("memory", "kernels", "micro")


# --- results ---


def machine() -> Row:
    import triton

    import vllm

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none (CPU)"
    versions = {
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    return {"date": date.today().isoformat(), "gpu": gpu, **versions}


def results_folder() -> Path:
    return RESULTS if torch.cuda.is_available() else WORK / "results"


def shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def save(step: str, rows: list[Row]) -> str:
    """Writes the step's rows as JSON and Markdown; returns the Markdown."""
    folder = results_folder()
    folder.mkdir(parents=True, exist_ok=True)
    where = machine()
    (folder / f"{step}.json").write_text(
        json.dumps({"machine": where, "rows": rows}, indent=1)
    )
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [
        f"# {step}",
        "",
        ", ".join(f"{key} {value}" for key, value in where.items()),
        "",
    ]
    lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    lines += [
        f"| {' | '.join(shown(row.get(c, '')) for c in columns)} |" for row in rows
    ]
    text = "\n".join(lines) + "\n"
    (folder / f"{step}.md").write_text(text)
    return text


def main() -> int:
    if sys.argv[1:2] == ["arm"]:
        request = json.loads(sys.argv[2])
        print(json.dumps(exact_arm(request) if "exact" in request else arm(request)))
        return 0
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=[*STEPS, "all"])
    parser.add_argument(
        "--cpu", action="store_true", help="try the script without a GPU"
    )
    arguments = parser.parse_args()
    if not arguments.cpu and not torch.cuda.is_available():
        parser.error("no GPU here: run it on a GPU machine, or try it with --cpu")
    wanted = list(STEPS) if arguments.step == "all" else [arguments.step]
    if arguments.cpu:
        wanted = [step for step in wanted if step not in NEEDS_GPU]
        if not wanted:
            parser.error(
                f"{arguments.step} needs a GPU; `make test` plays it without one"
            )
    failed = []
    for step in wanted:
        rows = STEPS[step](arguments.cpu)
        console.print(save(step, rows), markup=False, soft_wrap=True)
        if any(
            name in row and row[name] != right
            for row in rows
            for name, right in CHECKS.items()
        ):
            failed.append(step)
            if step == "memory":
                break
    console.print(f"FAILED: {', '.join(failed)}" if failed else "passed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
