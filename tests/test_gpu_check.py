# SPDX-License-Identifier: Apache-2.0
"""What of `benchmarks/gpu_check.py` can run without a GPU."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import gpu_check  # noqa: E402
import routing  # noqa: E402


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = [sys.executable, str(BENCHMARKS / "gpu_check.py"), *arguments]
    return subprocess.run(script, capture_output=True, text=True)


def test_help_and_the_refusal_without_a_gpu():
    help_text = command("--help")
    assert help_text.returncode == 0
    assert all(step in help_text.stdout for step in gpu_check.STEPS)
    refused = command("micro")
    assert refused.returncode == 2 and "no GPU here" in refused.stderr


def test_an_arm_measures_and_its_rows_compare_with_stock(tmp_path, monkeypatch):
    """An arm with slots under skewed routing: counters, step times, and the table that is kept."""
    request = {
        **{
            "model": gpu_check.TINY,
            "routing": "skewed",
            "batches": [2],
            "tokens": 4,
            "prefills": [24],
        },
        **{"max_model_len": 128, "max_num_seqs": 4, "serving": (2, 8, 4)},
        "options": {"enforce_eager": True, **gpu_check.slots_option(8)},
    }
    measured = gpu_check.run_arm(request)
    assert "failed" not in measured, measured
    decode = measured["decode"]["2"]
    assert decode["needed"] >= decode["hits"] > 0 and decode["loads"] > 0
    assert decode["bytes_loaded"] == decode["loads"] * 3 * 64 * 128 * 2
    assert measured["tokens_per_s"] > 0
    rate = 1e6
    rows = gpu_check.speed_rows("N = 8", "skewed", measured, measured, rate, tokens=4)
    assert [row["what"] for row in rows] == ["decode, batch 2", "prefill 24"]
    assert rows[0]["of stock"] == 1 and rows[0]["bound ms"] > rows[0]["ms"]
    failed = gpu_check.speed_rows("N = 96", "skewed", {"failed": "out of memory"}, measured, 1, 4)
    assert failed[0]["what"] == "failed: out of memory"
    monkeypatch.setattr(gpu_check, "WORK", tmp_path)
    table = gpu_check.save("speed", rows + failed)
    assert "| N = 8 | skewed | decode, batch 2 |" in table
    assert (tmp_path / "results" / "speed.json").exists()


@pytest.mark.parametrize(("name", "low", "high"), [("uniform", 0.38, 0.42), ("skewed", 0.9, 0.95)])
def test_routing_is_calibrated(name, low, high):
    """51 of 128 slots under LRU hit 40 % of uniform routing, and what is published for a real
    model of skewed routing."""
    assert low < routing.hit_rate(routing.STRATEGIES[name], 51, 1, "lru", steps=500) < high
