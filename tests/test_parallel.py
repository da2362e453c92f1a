# SPDX-License-Identifier: Apache-2.0
"""Tensor-parallel ranks decide alike without talking to each other, and outputs are stock's."""

import os
import subprocess
import sys
from pathlib import Path

from vllm.model_executor.layers.fused_moe.expert_slots.shared_store import stores

SCRIPT = """
import sys
sys.path.insert(0, "tests")
from engine import PROMPTS, answers, sampling, start

def main(checkpoint, place):
    results = []
    shared = {"slots": 8, "shared_store": place}
    for options in ({}, shared, shared):
        llm = start(checkpoint, tensor_parallel_size=2, **options)
        results.append(answers(llm.generate(PROMPTS, sampling(12), use_tqdm=False)))
        if options:
            first, second = llm.collective_rpc("expert_slot_counters")
            assert len(first) == 4 and first == second, (first, second)
            assert all(layer["loads"] > 0 and layer["slots"] == 8 for layer in first.values())
            assert all(layer["store_bytes"] == 32 * 3 * 32 * 128 * 2 for layer in first.values())
        llm.llm_engine.engine_core.shutdown()
    assert results[0] == results[1] == results[2]

if __name__ == "__main__":
    main(*sys.argv[1:])
"""


def test_two_ranks(checkpoint, tmp_path):
    """Two ranks hold half of every expert each, count the same and equal stock's two ranks. Each
    has a shared store of its own, built by the first start and attached by the second."""
    place = tmp_path / "stores"
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(checkpoint), str(place)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).resolve().parent.parent,
        env={**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    )
    assert result.returncode == 0, result.stderr[-3000:] + result.stdout[-1000:]
    log = result.stdout + result.stderr
    assert log.count("is complete: 3145728 bytes") == log.count("attached, 3145728 bytes") == 2
    assert [store.state for store in stores(place)] == ["complete", "complete"]
