# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The small model's trace can be recorded anew."""

from tests.support.traces import check_counters
from tools.small_moe import record
from vllm.model_executor.layers.fused_moe.expert_slots.trace.reading import Trace


def test_a_trace_of_a_few_requests(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")  # as the command does
    monkeypatch.chdir(tmp_path)  # restored afterwards
    monkeypatch.setattr(record, "REQUESTS", {1: 1, 8: 8})
    monkeypatch.setattr(record, "ANSWER", 6)
    file = tmp_path / "a.trace"
    assert record.main([str(file), "--together", "1", "8"]) == 0
    trace = Trace.read(file)
    assert trace.complete and trace.model == record.MODEL
    check_counters(trace)
    tokens = trace.layers[0].rows // trace.layers[0].top_k
    assert (tokens[1:5] == 1).all() and (tokens == 8).any()
