# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The example of docs/tuning.md: the trace of this repository, the text that the page
shows, and the pictures."""

import pytest

from tests.support import ROOT
from vllm.model_executor.layers.fused_moe.expert_slots.trace.reading import Trace

TRACE = "examples/small_moe/small_moe.trace"


def test_the_page_shows_what_the_command_prints(tune, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "100")
    status, printed, error = tune(TRACE, "--max-slots", 40, "--plots", tmp_path)
    assert status == 0 and not error
    page = (ROOT / "docs" / "tuning.md").read_text(encoding="utf-8")
    lines = [line.rstrip() for line in printed.splitlines()]
    begin = next(n for n, line in enumerate(lines) if line.startswith(TRACE))
    shown = "\n".join(f"    {line}".rstrip() for line in lines[begin:])
    assert shown in page, printed
    drawn = {path.name for path in tmp_path.iterdir()}
    kept = ROOT / "docs" / "pictures" / "tune"
    assert drawn == {path.name for path in kept.iterdir()}


def test_the_trace_names_no_machine():
    trace = Trace.read(ROOT / TRACE)
    assert trace.model == "examples/small_moe" and trace.complete
    assert all(layer.totals and not layer.lost for layer in trace.layers)


@pytest.mark.parametrize("together", [1, 8])
def test_batches_are_in_it(together):
    layer = Trace.read(ROOT / TRACE).layers[0]
    assert (layer.rows == together * layer.top_k).sum() > 400
