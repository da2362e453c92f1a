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
    """The engines that are asked for, which are not started; those in `broken` fail."""
    names = []

    def run_engine(request, seconds):
        names.append(request["name"])
        if request["name"] in run_engine.broken:
            return {"failed": "out of memory"}
        if "exact" in request:
            fine = {name: right for name, right in exact.CHECKS.items()}
            counted = dict.fromkeys(engine.COUNTED, 1)
            return {**fine, **counted, "outputs": [request["arm"]]}
        return step_of(2.0 if "additional_config" in request["options"] else 1.0)

    run_engine.broken = ()
    kept = results.folder(tmp_path)
    monkeypatch.setattr(runs, "results_folder", lambda: kept)
    monkeypatch.setattr(runs, "run_engine", run_engine)
    monkeypatch.setattr(exact, "checkpoint", lambda: None)
    return names


def test_a_second_run_measures_what_the_first_had_no_time_for(asked, monkeypatch):
    """Each engine once, a failed one again; the rows compare with the first of their
    routing."""
    late = runs.Options(cpu=True, deadline=time.monotonic() + runs.ENGINE_SECONDS - 1)
    for step in (speed.speed, speed.grid):
        [left] = step(late)
        assert left["result"].startswith(f"run {step.__name__} again, for ")
    assert asked == [] and "N = 8, topics-qwen3; N = 24" in left["result"]
    stock = "stock, resident, topics-qwen3, engine 1"
    monkeypatch.setattr(runs.run_engine, "broken", (stock,))
    first = speed.speed(runs.Options(cpu=True, first=True))
    assert len(asked) == 3 and len(first) == 1 + 2 * 2
    assert first[0]["result"] == "failed: out of memory"
    monkeypatch.setattr(runs.run_engine, "broken", ())
    rows = speed.speed(runs.Options(cpu=True))
    once = list(asked)
    assert len(set(once)) == len(once) - 1 == 2 * (2 + 2) and once.count(stock) == 2
    assert speed.speed(runs.Options(cpu=True)) == rows and asked == once
    assert [row["engine"] for row in rows[:8:2]] == [
        *("stock, resident", "N = 31", "N = 8", "stock, resident, again")
    ]
    ratios = {row["engine"]: row["of stock"] for row in rows if "of stock" in row}
    assert ratios["N = 8"] == 0.5 and ratios["stock, resident, again"] == 1
    assert len(speed.speed(runs.Options(cpu=True, engines=2))) == len(rows)
    assert len(set(asked)) == 2 * (len(once) - 1)


@pytest.mark.parametrize(("gib", "count"), [(6, 1), (24, 3), (80, 8), (141, 8)])
def test_small_engines_share_a_gpu(monkeypatch, gib, count):
    properties = SimpleNamespace(total_memory=gib << 30)
    monkeypatch.setattr(
        runs.torch.cuda, "get_device_properties", lambda device: properties
    )
    at_once, sizes = runs.beside_each_other()
    assert at_once == count
    assert sizes["gpu_memory_utilization"] == pytest.approx(0.9 / count)
    assert 1 <= speed.layers_here() <= 24 and (gib < 80) == (speed.layers_here() < 24)


def test_what_is_compared_for_exactness(asked, monkeypatch):
    """On a GPU: dtypes, graphs, both model runners, from top-k to all slots but one."""
    monkeypatch.setattr(exact, "beside_each_other", lambda: (2, {}))
    rows = exact.exact(runs.Options())
    assert len(set(asked)) == len(asked) == len(rows) + len(exact.ARMS)
    assert {row["engine"] for row in rows} >= {
        *("bfloat16, N = 4", "bfloat16, N = 31", "float16, N = 8", "top-1, N = 1"),
        *("model runner V1, N = 8", "PIECEWISE, N = 8", "FULL, N = 8"),
        *("bfloat16, stock again", "no waiting, N = 8", "no graphs, N = 8"),
    }
    assert all(row.items() >= exact.CHECKS.items() for row in rows)


def test_the_first_engines_are_as_many_as_a_large_gpu_takes(asked, monkeypatch):
    monkeypatch.setattr(exact, "beside_each_other", lambda: (2, {}))
    rows = exact.exact(runs.Options(first=True))
    assert len(asked) == 8 and {row["engine"] for row in rows} == {
        *("bfloat16, N = 8", "bfloat16, N = 31", "bfloat16, stock again"),
        *("model runner V1, N = 8", "no waiting, N = 8"),
    }


def test_a_difference_from_stock_fails():
    """An engine without stock beside it has no row yet."""
    stock = {"name": "a, stock", "arm": "a", "exact": {}, "measured": {"outputs": [1]}}
    slots = {
        **{"name": "a, N = 8", "arm": "a", "exact": {"slots": 8, "policy": "lru"}},
        "measured": {"outputs": [2], "loaded": False},
    }
    assert exact.rows_of(slots, [slots]) == [] == exact.rows_of(stock, [stock])
    [row] = exact.rows_of(slots, [stock, slots])
    assert not row["equal to stock"] and not row["loaded"]
    stock["measured"] = {"failed": "out of memory"}
    [row] = exact.rows_of(slots, [stock, slots])
    assert row["failed"] == "stock: out of memory" and not row["equal to stock"]
