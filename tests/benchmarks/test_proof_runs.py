# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which engines the GPU's proof runs, and what it says of what they measured."""

import time
from types import SimpleNamespace

import pytest

from benchmarks import results
from benchmarks.gpu import engine, exact, plot, runs, speed


def step_of(ms, **counted):
    return {"decode": {"1": {"ms": ms, **counted}}, "prefill": {}}


def test_engines_of_an_arm_give_a_median_and_a_range():
    slots, stock = map(step_of, (4.0, 9.0, 5.0)), map(step_of, (2.0, 3.0))
    broken = {"failed": "out of memory"}
    failed, row, _ = speed.speed_rows("N", "topics", [broken, *slots], [*stock], 0)
    assert failed["result"] == "failed: out of memory"
    assert row["ms"] == 5 and row["range"] == "4 to 9" and row["of stock"] == 0.5
    row, _ = speed.speed_rows("N", "topics", [step_of(4.0)], [broken], 0)
    assert "of stock" not in row and "range" not in row


def test_the_bound_is_the_resident_step_and_the_bytes_of_misses():
    """The draw of the experts, which both arms do, is taken off a second ratio."""
    counted = dict.fromkeys(engine.COUNTED, 2) | {"bytes_loaded": 6e6}
    slots, stock = step_of(10.0, **counted) | {"draw_ms": {"1": 1.0}}, step_of(2.0)
    slots["memory"] = {"memory as planned": True}
    row, memory = speed.speed_rows("N", "topics", [slots], [stock], rate=2e6)
    assert row["bound ms"] == 5 and row["of bound"] == 2 and row["hit rate"] == 1
    assert row["of stock"] == 0.2 and row["without it"] == pytest.approx(1 / 9)
    assert memory["what"] == "the engine" and memory["memory as planned"]
    slots["answers"], stock["answers"] = [1], [2]
    *_, row = speed.speed_rows("N", "topics", [slots], [stock], rate=2e6)
    assert not row["answers as stock's"]


def test_the_plot_of_speed(tmp_path):
    """A panel for each routing, a line for each batch, stock's offloads beside."""
    arms = {
        "stock, resident": 1.0,
        "stock, UVA experts": 9.0,
        "N = 8": 4.0,
        "N = 16": 2,
    }
    rows = [
        row
        for routing in ("uniform", "topics")
        for name, ms in arms.items()
        for row in speed.speed_rows(name, routing, [step_of(ms)], [step_of(1.0)], 0)
    ]
    plot.draw([{"result": "run speed again"}], tmp_path / "none.svg")
    plot.draw(rows[:1], tmp_path / "speed.svg")  # stock alone
    plot.draw(rows, tmp_path / "speed.svg")
    [drawn] = tmp_path.iterdir()
    text = drawn.read_text()
    assert all(word in text for word in ("uniform", "topics", "UVA", "batch 1"))


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """The requests of engines, which are not started, and the seconds that they have;
    those named in `broken` fail."""
    seen = SimpleNamespace(requests=[], seconds=[], broken=())

    def run_engine(request, seconds):
        seen.requests.append(request)
        seen.seconds.append(seconds)
        if request["name"] in seen.broken:
            return {"failed": "out of memory"}
        if "exact" in request:
            fine = {name: right for name, right in exact.CHECKS.items()}
            counted = dict.fromkeys(engine.COUNTED, 1)
            was = became(request)
            return {**fine, **counted, "outputs": [request["arm"]], "was": was}
        return step_of(2.0 if "additional_config" in request["options"] else 1.0)

    kept = results.folder(tmp_path)
    monkeypatch.setattr(runs, "results_folder", lambda: kept)
    monkeypatch.setattr(runs, "run_engine", run_engine)
    monkeypatch.setattr(exact, "checkpoint", lambda: None)
    monkeypatch.setattr(exact, "beside_each_other", lambda: (2, {"share": 0.4}))
    return seen


def became(request):
    """What vLLM makes of the arguments and the environment of an engine."""
    options, environment = request["exact"], request["environment"]
    graphs = options["compilation_config"]["cudagraph_mode"]
    v1 = environment.get("VLLM_USE_V2_MODEL_RUNNER") == "0"
    return {
        "runner": "V1" if v1 else "V2",
        "graphs": "NONE" if options["enforce_eager"] else graphs,
        "dtype": options["dtype"],
        "top-k": options.get("hf_overrides", {}).get("num_experts_per_tok", 4),
        "slots": "slots" in options,
        "sync check": environment.get("VLLM_GPU_SYNC_CHECK"),
    }


def names(requests):
    return [request["name"] for request in requests]


def test_a_second_run_measures_what_the_first_had_no_time_for(asked):
    """Each engine once, a failed one again; the rows compare with the first of their
    routing."""
    late = runs.Options(cpu=True, deadline=time.monotonic() + runs.TIMED_SECONDS - 1)
    for step in (speed.speed, speed.grid):
        [left] = step(late)
        assert left["result"].startswith(f"run {step.__name__} again, for ")
    assert asked.requests == [] and "N = 8, topics-qwen3; N = 24" in left["result"]
    stock = "stock, resident, topics-qwen3, engine 1"
    asked.broken = (stock,)
    soon = runs.Options(cpu=True, first=True, deadline=time.monotonic() + 200)
    first = speed.speed(soon)
    assert len(asked.requests) == 3 and len(first) == 1 + 2 * 2
    assert all(190 < seconds <= 200 for seconds in asked.seconds)
    assert first[0]["result"] == "failed: out of memory"
    asked.broken = ()
    rows = speed.speed(runs.Options(cpu=True))
    once = names(asked.requests)
    assert len(set(once)) == len(once) - 1 == 2 * (2 + 2) and once.count(stock) == 2
    assert asked.seconds[-1] == 480
    assert speed.speed(runs.Options(cpu=True)) == rows
    assert names(asked.requests) == once
    assert [row["engine"] for row in rows[:8:2]] == [
        *("stock, resident", "N = 31", "N = 8", "stock, resident, again")
    ]
    ratios = {row["engine"]: row["of stock"] for row in rows if "of stock" in row}
    assert ratios["N = 8"] == 0.5 and ratios["stock, resident, again"] == 1
    assert len(speed.speed(runs.Options(cpu=True, engines=2))) == len(rows)
    assert len(set(names(asked.requests))) == 2 * (len(once) - 1)


def on(monkeypatch, gib):
    """A GPU of that size."""
    properties = SimpleNamespace(total_memory=gib << 30)
    monkeypatch.setattr(
        runs.torch.cuda, "get_device_properties", lambda device: properties
    )
    monkeypatch.setattr(speed, "link_bytes_per_ms", lambda: 5e7)


def test_the_arms_of_speed(asked, monkeypatch):
    """Stock resident, its two offloads and slots, with and without graphs; stock does
    not read the experts of a long prompt over the link."""
    on(monkeypatch, gib=80)
    speed.speed(runs.Options())
    arms = {each["engine"]: each for each in asked.requests}
    prefills = {name: each["prefills"] for name, each in arms.items()}
    assert prefills.pop("stock, UVA experts") == [100, 2000]
    assert all(lengths == [100, 2000, 16000] for lengths in prefills.values())
    assert arms["N = 64, no graphs"]["options"]["enforce_eager"]
    assert arms["N = 64"]["options"]["additional_config"] == {"moe_gpu_prefetch": 64}
    assert arms["stock, prefetch offload"]["options"]["offload_backend"] == "prefetch"
    profiled = {name for name, each in arms.items() if each["profiled"]}
    assert profiled == {"stock, resident", "N = 64", "N = 32"}
    assert {each["routing"] for each in asked.requests} == set(speed.ROUTINGS)


@pytest.mark.parametrize(("gib", "arms"), [(24, 5), (80, 6)])
def test_the_grid_has_stock_where_it_fits(asked, monkeypatch, gib, arms):
    on(monkeypatch, gib)
    speed.grid(runs.Options())
    assert len(asked.requests) == 2 * arms


@pytest.mark.parametrize(("gib", "count"), [(6, 1), (24, 3), (80, 8), (141, 8)])
def test_small_engines_share_a_gpu(monkeypatch, gib, count):
    on(monkeypatch, gib)
    at_once, sizes = runs.beside_each_other()
    assert at_once == count
    assert sizes["gpu_memory_utilization"] == pytest.approx(0.9 / count)
    assert speed.layers_here() == {6: 2, 24: 8, 80: 12, 141: 12}[gib]


def test_what_is_compared_for_exactness(asked):
    """On a GPU: dtypes, graphs, both model runners, from top-k to all slots but one."""
    rows = exact.exact(runs.Options())
    assert len(set(names(asked.requests))) == len(asked.requests)
    assert len(asked.requests) == len(rows) + len(exact.ARMS)
    assert {row["engine"] for row in rows} == {
        *("bfloat16, N = 4", "bfloat16, N = 8", "bfloat16, N = 16", "bfloat16, N = 31"),
        *("bfloat16, stock again", "float16, N = 8", "top-1, N = 1"),
        *("model runner V1, N = 8", "PIECEWISE, N = 8", "FULL, N = 8"),
        *("no waiting, N = 8", "no graphs, N = 8"),
    }
    assert all(row.items() >= exact.CHECKS.items() for row in rows)
    for request in asked.requests:
        options = request["exact"]
        assert options.items() >= (exact.ON_A_GPU | {"share": 0.4}).items()
        compilation = options["compilation_config"]
        assert compilation["inductor_compile_config"] == exact.AS_WRITTEN
        disabled = request["environment"].get("VLLM_DISABLE_COMPILE_CACHE")
        assert disabled == ("1" if request["name"].endswith("again") else None)
    [traced] = [each for each in asked.requests if "trace" in each["exact"]]
    assert traced["name"] == "bfloat16, N = 8"


def test_the_first_engines_are_as_many_as_a_large_gpu_takes(asked):
    rows = exact.exact(runs.Options(first=True))
    assert len(asked.requests) == 8 and {row["engine"] for row in rows} == {
        *("bfloat16, N = 8", "bfloat16, N = 31", "bfloat16, stock again"),
        *("model runner V1, N = 8", "no waiting, N = 8"),
    }


@pytest.mark.parametrize("name", exact.ARMS)
def test_an_engine_that_is_not_what_was_asked_for_is_noticed(name):
    arm = exact.ARMS[name]
    request = exact.request(name, 1, cpu=False, sizes={})
    right = request | {"measured": {"was": became(request)}}
    assert exact.as_asked(right)
    for wrong in (
        *({"runner": "V3"}, {"graphs": "FULL_DECODE_ONLY"}, {"dtype": "float32"}),
        *({"slots": False}, {"sync check": "warn"}, {"top-k": 2}),
    ):
        was = {"was": became(request) | wrong}
        assert not exact.as_asked(request | {"measured": was})
    plain = exact.request("bfloat16", 1, cpu=False, sizes={})
    if arm is not exact.ARMS["bfloat16"]:  # what makes the arm is seen in the engine
        assert became(plain) != became(request)


def test_a_difference_from_stock_fails():
    """An engine without stock beside it has no row yet."""
    stock, slots = (exact.request("FULL", n, cpu=False, sizes={}) for n in (0, 1))
    stock["measured"] = {"outputs": [1], "was": became(stock)}
    slots["measured"] = {"outputs": [2], "was": became(stock), "loaded": False}
    assert exact.rows_of(slots, [slots]) == [] == exact.rows_of(stock, [stock])
    [row] = exact.rows_of(slots, [stock, slots])
    assert not row["equal to stock"] and not row["loaded"]
    assert not row["engine as asked"]
    stock["measured"] = {"failed": "out of memory"}
    [row] = exact.rows_of(slots, [stock, slots])
    assert row["failed"] == "stock: out of memory" and not row["equal to stock"]
