# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What of the GPU's proof of quantised experts can run without a GPU: the whole step on
the CPU platform, and what it says of engines that differ."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.layers.fused_moe.experts import marlin_moe

from benchmarks import results
from benchmarks.gpu import (
    engine,
    proof,
    quantised,
    quantised_engine,
    quantised_kernels,
    runs,
)
from tests.support import ROOT
from tests.support import quantised as checkpoints
from tests.support.without_amx import gates_open, kernel_is_here
from tests.weights.test_parts import layer_of
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.marlin_experts import (
    _blocks_mapped,
    mapping_blocks,
)
from vllm.model_executor.layers.fused_moe.expert_slots.layer import ExpertSlotsMixin
from vllm.model_executor.layers.fused_moe.expert_slots.weights import parts
from vllm.plugins.moe_gpu_prefetch import start as start_up

PASSED = {name: True for name in quantised.CHECKS if "processing" not in name}


@pytest.mark.skipif(not kernel_is_here(), reason="this vLLM has no such kernel")
def test_the_step_on_the_cpu_platform(tmp_path, monkeypatch):
    """Stock and slots of one format, with stock's gates open. The comparison of kernels
    notices rows that are changed for each other."""
    compare, wrong = quantised_kernels.compared, []
    use_slots = quantised_kernels.Kernels.use_slots

    def use_wrong_rows(self, slots):
        use_slots(self, slots)
        for rows in self.slotted.slot_manager.rows.slot_rows.values():
            rows[:2] = rows[:2].flip(0)

    def compared(layer, tokens):
        found = compare(layer, tokens)
        with monkeypatch.context() as patch:
            patch.setattr(quantised_kernels.Kernels, "use_slots", use_wrong_rows)
            wrong.append(compare(layer, [40]))
        return found

    def run_engine(request, seconds):
        with gates_open():
            return json.loads(json.dumps(engine.measured_by(request)))

    kept = results.folder(tmp_path)
    # In a process of its own: an engine may have changed transformers' classes in this
    # one.
    write = "; ".join(
        (
            "from pathlib import Path",
            "from tests.support import quantised",
            "quantised.WIDTH = 256",
            f"place = Path({str(tmp_path)!r})",
            "quantised.make_quantised(place / 'quantised-fp8-block', 'fp8-block')",
        )
    )
    subprocess.run([sys.executable, "-c", write], cwd=ROOT, check=True)
    monkeypatch.setattr(checkpoints, "WIDTH", 256)
    monkeypatch.setattr(engine, "WORK", tmp_path)
    monkeypatch.setattr(runs, "results_folder", lambda: kept)
    monkeypatch.setattr(runs, "run_engine", run_engine)
    monkeypatch.setattr(quantised_kernels, "compared", compared)
    # The second on a GPU alone.
    formats = ("fp8-block", "fp8-static")
    [row] = quantised.quant(runs.Options(cpu=True, formats=formats))
    assert row.items() >= PASSED.items()
    assert row["kernel"] == "SlottedCPUExpertsFp8" and row["misses"] > 0
    assert row["kernel steps"] == 3 * 4 and row["stock repeats itself"]
    assert not wrong[0]["kernel equal to stock's"] and wrong[0]["kernel steps"] == 4
    done = json.loads((kept / "raw" / "quant.json").read_text())
    assert [len(each["measured"]["prefills"]) for each in done] == [3, 1]
    assert len(done[0]["measured"]["prefills"][0]) == 96


STOCK = {"kernel": "Marlin", "batch 1": [1, 2], "prefills": [[-1.0, -2.0]] * 3}
SLOTS = {
    **{"kernel": "SlottedMarlin", "batch 1": [1, 2], "prefills": [[-1.0, -2.0]]},
    **{"misses": 3, "bytes loaded": 30, "bytes per expert": 10},
    "staging is shared": True,
    "kernel steps": {"kernel equal to stock's": True},
}


@pytest.mark.parametrize(
    ("differs", "check"),
    [
        ({}, None),
        ({"batch 1": [1, 3]}, "batch 1 equal to stock"),
        ({"kernel": "Marlin"}, "batch 1 equal to stock"),
        ({"failed": "out of memory"}, "batch 1 equal to stock"),
        ({"prefills": [[-1.0, -2.5]]}, "prefill as stock's"),
        ({"bytes loaded": 31}, "bytes are those of misses"),
        ({"misses": 0, "bytes loaded": 0}, "bytes are those of misses"),
        ({"staging is shared": False}, "staging is shared"),
        ({"kernel steps": {"kernel equal to stock's": False}}, None),
        ({"processing": {"processing within the plan": False}}, None),
    ],
)
def test_each_difference_fails_its_check(differs, check):
    row = quantised.judged(STOCK, SLOTS | differs)
    failed = {n for n, right in proof.CHECKS.items() if row.get(n, right) != right}
    last = next(iter(differs.values()), None)
    expected = set(last) if isinstance(last, dict) else {check} - {None}
    assert failed == expected


def test_where_stock_does_not_repeat_itself_slots_must_be_as_near():
    stock = [[-1.0, -2.0], [-1.1, -2.0], [-1.0, -2.2]]
    near, far, odd = [-1.2, -2.1], [-1.0, -2.5], [-1.0, float("nan")]
    row = quantised.of_prefill(stock, near)
    assert row["stock's own distance"] == pytest.approx(0.2)
    assert row["distance from stock"] == pytest.approx(0.1)
    assert not row["stock repeats itself"] and row["prefill as stock's"]
    assert not quantised.of_prefill(stock, far)["prefill as stock's"]
    assert not quantised.of_prefill(stock, odd)["prefill as stock's"]
    assert not quantised.of_prefill([[-1.0]] * 3, [-1.0 - 1e-9])["prefill as stock's"]


def test_the_kernels_of_each_format_by_capability():
    assert quantised.backends("fp8-block", (8, 0)) == ("marlin",)
    assert quantised.backends("fp8-static", (8, 9)) == ("triton",)
    assert quantised.backends("int4-ct", (8, 6)) == ("marlin", "triton")
    assert quantised.backends("awq", (12, 0)) == ("marlin",)


def test_an_alignment_is_made_once_and_its_blocks_are_mapped(monkeypatch):
    """Two who ask get the same rows in the same order, though stock's order would be
    another one the second time."""
    times = []

    def align(ids, block_size, experts):
        times.append(1)
        rows = torch.tensor([0, 1, 2, 3]).roll(len(times))
        return rows, torch.tensor([2, 1]), torch.tensor(2 * block_size)

    monkeypatch.setattr(marlin_moe, "moe_align_block_size", mapping_blocks(align))
    same = quantised_kernels.SameAlignment()
    hooked = mapping_blocks(same)
    stock = hooked("ids", 2, 3)
    table = torch.tensor([2, 0, 1])
    for right in (True, False):
        # What a GPU's kernel writes.
        monkeypatch.setattr(
            "vllm.model_executor.layers.fused_moe.expert_slots.cuda.marlin_experts."
            "map_blocks",
            lambda blocks, table, right=right: blocks.copy_(table[blocks] * right),
        )
        with _blocks_mapped(table):
            slots = hooked("ids", 2, 3)
        assert torch.equal(slots[0], stock[0]) and len(times) == 1
        assert same.mapped_by(table) is right
    same.renew()
    assert len(times) == 2 and not torch.equal(hooked("ids", 2, 3)[0], stock[0])
    same.forget()
    hooked("ids", 2, 3)
    assert len(times) == 3


@pytest.mark.parametrize(
    ("peak", "stays", "right"), [(900, 0, True), (1100, 0, False), (900, 600, False)]
)
def test_the_memory_of_processing(monkeypatch, peak, stays, right):
    """A layer may hold what is planned for it, and nothing may stay on the GPU but rows
    that are plain tensors."""
    layer = SimpleNamespace(processing_bytes=1000)
    footprint = SimpleNamespace(layers=[layer])
    tensors = {"w": torch.zeros(4, 4096), "scale": torch.zeros(4, 25)}
    rows = SimpleNamespace(
        tensors=tensors, num_staged=2, memory=SimpleNamespace(page=4096)
    )
    plain = quantised_engine.plain_bytes(rows)
    assert plain == tensors["scale"].nbytes
    held = iter([5000, 5000 + peak + plain, 5000 + stays + plain])

    def stats():
        found = next(held)
        return {
            f"requested_bytes.all.{moment}": found for moment in ("current", "peak")
        }

    for name, value in (
        ("is_available", lambda: True),
        ("reset_peak_memory_stats", lambda: None),
        ("memory_stats", stats),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(quantised_engine, "SLACK", 50)
    monkeypatch.setattr(quantised_engine.gc, "collect", lambda: 0)
    monkeypatch.setattr(
        start_up, "measure", lambda: SimpleNamespace(footprints=[footprint])
    )
    layer_of_16 = layer_of(16, 3 * 512 * 1024 // 2)
    monkeypatch.setattr(
        ExpertSlotsMixin,
        "_process_then_make_slots",
        lambda self, layer: parts.parts_of(layer_of_16),
    )
    seen = {}
    slotted = SimpleNamespace(slot_manager=SimpleNamespace(rows=rows))
    with quantised_engine.processing_watched(seen):
        start_up.measure()
        ExpertSlotsMixin._process_then_make_slots(slotted, torch.nn.Module())
    assert seen["processing"]["processing within the plan"] is right
    assert seen["processing"]["parts of a layer"] == 4
    with quantised_engine.processing_watched(seen):
        pass  # nothing was planned or processed
    assert seen["processing"] == {"processing within the plan": False}


def test_formats_are_given_by_name(monkeypatch, capsys, tmp_path):
    """`--quant` is a step of its own; a failed check sets the status."""
    asked = []

    def quant(options):
        asked.append((options.cpu, options.formats))
        return [{"format": "gptq", "prefill as stock's": options.cpu}]

    kept = results.folder(tmp_path)
    monkeypatch.setitem(proof.STEPS, "quant", quant)
    monkeypatch.setattr(runs, "results_folder", lambda: kept)
    for words in ([], ["quant", "--quant", "gptq"], ["--quant", "int3"]):
        monkeypatch.setattr(sys, "argv", ["proof.py", "--cpu", *words])
        with pytest.raises(SystemExit, match="2"):
            proof.main()
    capsys.readouterr()
    for words, formats in ((["gptq", "awq"], ("gptq", "awq")), ([], ())):
        monkeypatch.setattr(sys, "argv", ["proof.py", "--cpu", "--quant", *words])
        assert proof.main() == 0 and asked.pop() == (True, formats)
    printed = capsys.readouterr().out
    assert "benchmarks.gpu.proof --quant gptq awq --cpu" in printed
    monkeypatch.setattr(proof.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "argv", ["proof.py", "--quant"])
    assert proof.main() == 1 and "FAILED: quant" in capsys.readouterr().out
