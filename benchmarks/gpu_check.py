# SPDX-License-Identifier: Apache-2.0
"""Proves and measures expert slots on a GPU, step by step. Each step ends within eight minutes; run
again, it goes on with the engines that it had no time for. Results go to benchmarks/results/, as
JSON and as a Markdown table. Not yet run on a GPU.

kernels  plan and gather against reference.py, thousands of random steps
micro    plan in µs; gather in GB/s beside the copy engine and a GEMM that reads host memory
exact    a small real checkpoint with CUDA graphs on: token ids and logprobs equal stock's
speed    decode and prefill at the expert shapes of Qwen3-30B-A3B, as ratios to stock
grid     vLLM issue #41447: expert shapes of gemma-4-26B-A4B, 16 requests of 64+64 tokens
all      the five, in this order

On a machine without a GPU, `--cpu` runs exact, speed and grid small, to try the script itself;
what that measures says nothing about a GPU and stays out of benchmarks/results/.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "kernels"), str(ROOT / "benchmarks")]
if __name__ == "__main__":  # whoever imports this keeps an environment of its own
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

import routing  # noqa: E402
import torch  # noqa: E402
from rich.console import Console  # noqa: E402

WORK = ROOT / ".demo" / "gpu_check"
RESULTS = ROOT / "benchmarks" / "results"
ARMS_SECONDS = 400
"""No engine is started later than this into a step: one takes a minute or so."""
Row = dict[str, Any]
TINY = {
    **{"hidden": 128, "width": 64, "experts": 32, "top_k": 4},
    **{"heads": 4, "head_dim": 32, "layers": 2},
}
"""The model of `--cpu`."""
console = Console()


# --- arms: one engine each, in a process of its own, so that the next finds the memory free ---


def watch_loading(measured: Row) -> None:
    """Notes the peak of GPU memory while the model loads: the experts must never all be there."""
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    load_model = BaseModelLoader.load_model

    def watched(*args: Any, **kwargs: Any) -> Any:
        torch.cuda.reset_peak_memory_stats()
        model = load_model(*args, **kwargs)
        measured["load_peak_gib"] = torch.cuda.max_memory_allocated() / (1 << 30)
        measured["loaded_gib"] = torch.cuda.memory_allocated() / (1 << 30)
        return model

    BaseModelLoader.load_model = watched


def arm(request: Row) -> Row:
    """Runs one engine as `request` says and returns what it measured."""
    import routing

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
    slotted = "additional_config" in request["options"]

    def counters() -> Row:
        if not slotted:
            return {}
        layers = llm.collective_rpc("expert_slot_counters")[0].values()
        return {
            name: sum(layer[name] for layer in layers)
            for name in ("needed", "hits", "loads", "bytes_loaded", "overflow_steps", "steps")
        }

    def seconds(requests: int, prompt: int, tokens: int) -> float:
        ids = torch.randint(3, 1000, (requests, prompt), generator=generator).tolist()
        sampling = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        begin = time.perf_counter()
        llm.generate([{"prompt_token_ids": i} for i in ids], sampling, use_tqdm=False)
        return time.perf_counter() - begin

    tokens = request["tokens"]
    for batch in request["batches"]:
        seconds(batch, 16, 8)
        steps = []
        before = counters()
        for _ in range(3):
            # A short run taken off a long one leaves decode steps alone.
            steps.append((seconds(batch, 16, tokens + 1) - seconds(batch, 16, 1)) / tokens)
        after = counters()
        moved = {name: after[name] - before[name] for name in after}
        measured["decode"][str(batch)] = {"step_ms": statistics.median(steps) * 1e3, **moved}
    for length in request["prefills"]:
        seconds(1, length, 1)
        spent = [seconds(1, length, 1) for _ in range(3)]
        measured["prefill"][str(length)] = statistics.median(spent) * 1e3
    if serving := request.get("serving"):
        requests, prompt, out = serving
        seconds(requests, prompt, 4)
        measured["tokens_per_s"] = requests * (prompt + out) / seconds(requests, prompt, out)
    if torch.cuda.is_available():
        measured["gpu_gib"] = torch.cuda.max_memory_allocated() / (1 << 30)
    return measured


def run_arm(request: Row) -> Row:
    """`arm` in a process of its own; a failed start is a result, with the last line of its log."""
    environment = {**os.environ, "VLLM_MOE_ROUTING_SIMULATION_STRATEGY": request["routing"]}
    process = subprocess.run(
        [sys.executable, __file__, "arm", json.dumps(request)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=480,
    )
    if process.returncode == 0:
        return json.loads(process.stdout.splitlines()[-1])
    lines = [line for line in process.stderr.splitlines() if line.strip()]
    return {"failed": (lines or ["no output"])[-1][:300]}


def run_arms(step: str, requests: list[Row], rows_of: Callable[[Row, list[Row]], list[Row]]) -> Any:
    """Runs the requests that have no rows yet, while there is time, saving after each one.

    Args:
        rows_of: (request with its measurement under "measured", all requests so far) -> rows.
    """
    begin = time.monotonic()
    kept = results_folder() / f"{step}-arms.json"
    done: list[Row] = json.loads(kept.read_text()) if kept.exists() else []
    done = [request for request in done if request["machine"] == machine()]
    for request in requests:
        if any(request.items() <= earlier.items() for earlier in done):
            continue
        if time.monotonic() - begin > ARMS_SECONDS:
            console.print(f"no time for {request['name']} and those after it: run {step} again")
            break
        done.append({**request, "measured": run_arm(request), "machine": machine()})
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(done))
        console.print(f"{request['name']}, {request['routing']} routing: measured")
    return [row for request in done for row in rows_of(request, done)]


def make_model(shape: Row) -> Path:
    """A directory with the config of a Qwen3-MoE of `shape`; the weights are dummies."""
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


def kernels(cpu: bool) -> list[Row]:
    import pair

    rows = []
    for experts, slots, top_k in ((128, 64, 8), (128, 16, 8), (60, 15, 4), (512, 300, 16)):
        for policy in ("lru", "lfu"):
            both = pair.Pair(experts, slots, policy, half_life=64, device="cuda")
            generator = torch.Generator().manual_seed(slots)
            steps = 600
            for step in range(steps):
                tokens = 600 if step % 100 == 99 else 1 + step % 5
                ids = pair.routing(generator, tokens, experts, top_k, 0.1)
                mask = torch.rand(tokens, generator=generator) < 0.2 if step % 3 == 0 else None
                both.step((ids + step // 50) % experts, mask)
            rows.append(
                {"E": experts, "N": slots, "top-k": top_k, "policy": policy, "equal steps": steps}
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


def micro(cpu: bool) -> list[Row]:
    from pair import make_manager
    from vllm.utils.torch_utils import get_accelerator_view_from_cpu_tensor

    from vllm.model_executor.layers.fused_moe.expert_slots.device_slots import DeviceSlotManager
    from vllm.model_executor.layers.fused_moe.expert_slots.host_store import ExpertStore
    from vllm.model_executor.layers.fused_moe.expert_slots.pinning import pinned

    hidden, width, experts, slots = 2048, 768, 128, 64
    tensors = {
        "w13_weight": torch.zeros(experts, 2 * width, hidden, dtype=torch.bfloat16),
        "w2_weight": torch.zeros(experts, hidden, width, dtype=torch.bfloat16),
    }
    tensors = {name: pinned(tensor) for name, tensor in tensors.items()}
    store = ExpertStore(tensors)
    rows = []
    for policy in ("lru", "lfu"):
        manager = make_manager(DeviceSlotManager, store, slots, policy, 128, "cuda")
        for tokens in (1, 8, 64, 8192):
            ids = torch.rand(tokens, experts, device="cuda").topk(8).indices.int()
            hits = torch.arange(8, device="cuda", dtype=torch.int32).repeat(tokens, 1)
            for what, routed in (("all hits", hits), ("random ids", ids)):
                spent = microseconds(partial(manager.plan, routed))
                rows.append({"what": f"plan, {policy}, {tokens} tokens, {what}", "µs": spent})

    # Eight misses: two sets of eight experts that evict each other from eight slots.
    manager = make_manager(DeviceSlotManager, store, 8, "lru", 128, "cuda")
    first = torch.arange(16, 24, device="cuda", dtype=torch.int32)[None]
    sets = [first, first + 8]

    def plan_and_load() -> None:
        sets.reverse()
        manager.plan(sets[0])
        manager.load(0)

    def plan_only() -> None:
        sets.reverse()
        manager.plan(sets[0])

    spent = microseconds(plan_and_load) - microseconds(plan_only)
    size = 8 * store.bytes_per_expert
    rows.append({"what": "gather, 8 experts", "µs": spent, "GB/s": size / spent / 1e3})
    targets = {name: torch.empty_like(t[:8], device="cuda") for name, t in tensors.items()}

    def copy() -> None:
        for name, tensor in tensors.items():
            targets[name].copy_(tensor[16:24], non_blocking=True)

    spent = microseconds(copy, repeat=20)
    rows.append({"what": "copy engine, same bytes", "µs": spent, "GB/s": size / spent / 1e3})
    view = get_accelerator_view_from_cpu_tensor(tensors["w13_weight"])[:8].flatten(0, 1)
    x = torch.zeros(16, hidden, dtype=torch.bfloat16, device="cuda")
    spent = microseconds(lambda: x @ view.T, repeat=20)
    size = view.numel() * 2
    rows.append({"what": "GEMM on host memory", "µs": spent, "GB/s": size / spent / 1e3})
    return rows


def exact(cpu: bool) -> list[Row]:
    from engine import run
    from sample import make_checkpoint

    checkpoint = make_checkpoint(WORK / "qwen3-moe")
    rows = []
    common: Row = {"enforce_eager": cpu}
    if not cpu:
        common |= {"attention_backend": "TRITON_ATTN", "gpu_memory_utilization": 0.3}
    for dtype in ("bfloat16",) if cpu else ("bfloat16", "float16"):
        backend = {} if cpu else {"moe_backend": "triton"}
        stock = run(checkpoint, dtype=dtype, **common, **backend)
        for slots, policy in ((4, "lru"), (8, "lfu"), (16, "lru"), (31, "lru")):
            slotted = run(checkpoint, dtype=dtype, slots=slots, policy=policy, **common)
            rows.append(
                {
                    **{"dtype": dtype, "N": f"{slots} of 32", "policy": policy},
                    "graphs": "no" if cpu else "FULL_AND_PIECEWISE",
                    "equal to stock": slotted.outputs == stock.outputs,
                    "loads": slotted.total("loads"),
                    "overflow steps": slotted.total("overflow_steps"),
                }
            )
    return rows


def bus_bytes_per_ms() -> float:
    """What the copy engine reaches from pinned memory."""
    home = torch.empty(1 << 28, dtype=torch.uint8).pin_memory()
    target = torch.empty_like(home, device="cuda")
    return home.numel() / microseconds(lambda: target.copy_(home, non_blocking=True), 8) * 1e3


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
    prefetch = {"offload_backend": "prefetch", "offload_group_size": 1, "offload_num_in_group": 1}
    arms: dict[str, Row] = {"stock, resident": {}}
    if not cpu:
        arms["stock, UVA experts"] = offload | {"cpu_offload_params": ["routed_experts"]}
        arms["stock, prefetch offload"] = prefetch | {"offload_params": ["routed_experts"]}
    arms |= {f"N = {slots}": slots_option(slots) for slots in all_slots}
    rate = 0.0 if cpu else bus_bytes_per_ms()
    requests = [
        {
            **{"name": name, "model": shape, "routing": strategy, "batches": batches},
            **{"tokens": tokens, "prefills": prefills, "max_model_len": max(prefills) + 128},
            **{"max_num_seqs": max(batches), "options": common | options},
        }
        for strategy in routing.STRATEGIES
        for name, options in arms.items()
    ]

    def rows_of(request: Row, done: list[Row]) -> list[Row]:
        resident = next(d for d in done if d["routing"] == request["routing"])["measured"]
        measured = request["measured"]
        return speed_rows(request["name"], request["routing"], measured, resident, rate, tokens)

    return run_arms("speed", requests, rows_of)


def speed_rows(
    arm_name: str, strategy: str, measured: Row, resident: Row, rate: float, tokens: int
) -> list[Row]:
    """One row a batch size or prompt length; the bound is the resident step plus its misses' bytes
    at the rate of the bus."""
    head = {"arm": arm_name, "routing": strategy}
    if "failed" in measured:
        return [{**head, "what": f"failed: {measured['failed']}"}]
    rows = []
    for batch, decode in measured["decode"].items():
        step = decode["step_ms"]
        stock = resident["decode"][batch]["step_ms"] if "decode" in resident else float("nan")
        row = {**head, "what": f"decode, batch {batch}", "ms": step, "of stock": stock / step}
        if decode.get("needed"):
            per_step = 3 * (tokens + 2)
            row["hit rate"] = decode["hits"] / decode["needed"]
            row["MB a step"] = decode["bytes_loaded"] / per_step / 1e6
            if rate:
                bound = stock + decode["bytes_loaded"] / per_step / rate
                row |= {"bound ms": bound, "of bound": step / bound}
        rows.append(row)
    for length, spent in measured["prefill"].items():
        stock = resident["prefill"][length] if "prefill" in resident else float("nan")
        rows.append({**head, "what": f"prefill {length}", "ms": spent, "of stock": stock / spent})
    return rows


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
    published = {16: "21.1", 32: "33.9", 64: "52.7 (fails at 75 %)", 72: "59.0", 96: "fails"}
    requests = [
        {
            **{"name": f"N = {slots}", "model": shape, "routing": strategy, "batches": []},
            **{"tokens": 0, "prefills": [], "max_model_len": 4096, "serving": list(serving)},
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
            "published (A100-40G)": "" if cpu else published[slots],
        }
        if "load_peak_gib" in measured:
            row |= {
                "GPU GiB loaded": measured["loaded_gib"],
                "peak while loading": measured["load_peak_gib"],
                "experts stayed off": measured["load_peak_gib"] < measured["loaded_gib"] + 0.5,
                "GPU GiB serving": measured["gpu_gib"],
            }
        return [row]

    return run_arms("grid", requests, rows_of)


STEPS = {"kernels": kernels, "micro": micro, "exact": exact, "speed": speed, "grid": grid}


# --- results ---


def machine() -> Row:
    import triton

    import vllm

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none (CPU)"
    versions = {"vllm": vllm.__version__, "torch": torch.__version__, "triton": triton.__version__}
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
    (folder / f"{step}.json").write_text(json.dumps({"machine": where, "rows": rows}, indent=1))
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"# {step}", "", ", ".join(f"{key} {value}" for key, value in where.items()), ""]
    lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    lines += [f"| {' | '.join(shown(row.get(c, '')) for c in columns)} |" for row in rows]
    text = "\n".join(lines) + "\n"
    (folder / f"{step}.md").write_text(text)
    return text


def main() -> int:
    if sys.argv[1:2] == ["arm"]:
        print(json.dumps(arm(json.loads(sys.argv[2]))))
        return 0
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=[*STEPS, "all"])
    parser.add_argument("--cpu", action="store_true", help="try the script without a GPU")
    arguments = parser.parse_args()
    if not arguments.cpu and not torch.cuda.is_available():
        parser.error("no GPU here: run it on a GPU machine, or try it with --cpu")
    wanted = list(STEPS) if arguments.step == "all" else [arguments.step]
    if arguments.cpu:
        wanted = [step for step in wanted if step not in ("kernels", "micro")]
        if not wanted:
            parser.error(f"{arguments.step} needs a GPU; `make test` runs the kernels without one")
    wrong = 0
    for step in wanted:
        rows = STEPS[step](arguments.cpu)
        console.print(save(step, rows), markup=False)
        checks = ("equal to stock", "experts stayed off")
        wrong += sum(row.get(check) is False for row in rows for check in checks)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
