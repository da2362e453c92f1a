# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The link between host and GPU: its bandwidth by a stand-in clock, its cost by hand,
and the log lines of a real engine that takes its platform for CUDA. No GPU ran this."""

import argparse
import math
from types import SimpleNamespace

import pytest
import torch
from prometheus_client import REGISTRY

from vllm.model_executor.layers.fused_moe.expert_slots.capacity import link
from vllm.model_executor.layers.fused_moe.expert_slots.capacity.link import (
    bandwidth,
    link_cost,
    measured_bandwidth,
    staging_copies,
)
from vllm.model_executor.layers.fused_moe.expert_slots.cpu.memory import CPUMemory
from vllm.model_executor.layers.fused_moe.expert_slots.weights.rows import ExpertRows
from vllm.model_executor.layers.fused_moe.expert_slots.weights.store import ExpertStore
from vllm.plugins.moe_gpu_prefetch import report

MIB = 1 << 20
QWEN3_30B = (128, 8, 16, 9_437_184)


class Link:
    """Copies of any size, without memory behind them, over a link of `speed` bytes a
    second, and their clock. The first copy takes a second."""

    def __init__(self, speed):
        self.speed, self.now, self.copies = speed, 0.0, 0

    def clock(self):
        return self.now

    def target(self, nbytes):
        def copy_(source):
            self.now += nbytes / self.speed if self.copies else 1.0
            self.copies += 1

        return SimpleNamespace(nbytes=nbytes, copy_=copy_)


@pytest.mark.parametrize("speed", [0.4e9, 3.2e9, 25e9, 400e9])
def test_the_bandwidth_is_that_of_the_link(speed):
    """The first copy does not count. A slow link takes a fraction of a second too."""
    link = Link(speed)
    copies = [(link.target(32 * MIB), None), (link.target(24 * MIB), None)]
    assert measured_bandwidth(copies, link.clock) == pytest.approx(speed)
    assert link.now < 1.0 + 0.25 + 32 * MIB / speed
    moved = (link.now - 1.0) * speed
    assert moved < 256 * MIB + 32 * MIB
    assert round(moved) >= 256 * MIB or link.now >= 1.25


def test_small_copies_do_not_count():
    """They measure how long a copy takes to start."""
    link = Link(25e9)
    assert measured_bandwidth([(link.target(MIB - 1), None)] * 9, link.clock) is None
    assert measured_bandwidth([], link.clock) is None
    assert link.copies == 0
    fast, slow = Link(25e9), Link(1e6)
    copies = [(slow.target(1000), None), (fast.target(MIB), None)]
    assert measured_bandwidth(copies, fast.clock) == pytest.approx(25e9)
    assert slow.copies == 0


def layer_rows(slots, experts=8):
    homes = {
        "w13": torch.arange(experts * 6.0).view(experts, 2, 3),
        "w2": torch.arange(experts * 600_000.0).view(experts, 600_000),
    }
    rows = ExpertRows(ExpertStore(homes), slots, CPUMemory())
    rows.fill_slots(range(slots))
    return rows


def test_measuring_leaves_slots_and_store_as_they_were(monkeypatch):
    """It writes to staging rows only, and takes no memory except the layer's own."""
    monkeypatch.setattr(link, "_PIECE", 3 * 2_400_000 + 5)
    rows = layer_rows(3)
    slots = {name: slot.clone() for name, slot in rows.slot_rows.items()}
    store = {name: home.clone() for name, home in rows.store.tensors.items()}
    copies = list(staging_copies(rows))
    assert [target.nbytes for target, _ in copies] == [5 * 24, 3 * 2_400_000]
    for target, source in copies:
        assert (
            target.shape == source.shape
            and target.is_contiguous()
            and source.is_contiguous()
        )
    assert measured_bandwidth(copies) > 0
    for name in rows.tensors:
        assert torch.equal(rows.slot_rows[name], slots[name])
        assert torch.equal(rows.store.tensors[name], store[name])
    assert torch.equal(rows.tensors["w2"][:3], store["w2"][:3])  # it was copied


def test_a_large_expert_is_copied_alone(monkeypatch):
    """A piece is never less than a row, nor more than the staging rows."""
    monkeypatch.setattr(link, "_PIECE", 100)
    assert [len(target) for target, _ in staging_copies(layer_rows(3))] == [4, 1]
    assert [len(target) for target, _ in staging_copies(layer_rows(7))] == [1, 1]


def test_the_cost_of_a_miss_and_of_a_token():
    """Qwen3-30B-A3B in bfloat16 from 16 of 128 slots on PCIe 4.0, worked by hand."""
    cost = link_cost(25e9, [QWEN3_30B] * 48)
    assert cost.seconds_per_miss == pytest.approx(9_437_184 / 25e9)
    assert cost.bytes_per_token == pytest.approx(48 * 8 * 112 / 128 * 9_437_184)
    assert cost.seconds_per_token == pytest.approx(0.12683, rel=1e-3)
    assert cost.tokens_per_second == pytest.approx(7.884, rel=1e-3)
    sentence = cost.sentence("given")
    for figure in (
        "25.0 GB/s given",
        "9.44 MB takes 0.38 ms",
        "3.17 GB",
        "127 ms",
        "7.9 tokens/s",
    ):
        assert figure in sentence
    assert cost.warning() is None


def test_layers_may_differ_and_full_residency_costs_nothing():
    cost = link_cost(10e9, [(8, 2, 4, 100), (8, 2, 8, 1000), (4, 0.5, 1, 40)])
    assert cost.bytes_per_token == 2 * 0.5 * 100 + 0.5 * 0.75 * 40
    assert cost.bytes_per_expert == 1000
    for full in (link_cost(1e9, [(8, 2, 8, 1000)]), link_cost(1e9, [])):
        assert full.tokens_per_second == math.inf and full.warning() is None
        assert "no token loads one" in full.sentence()


def test_uniform_routing_loads_what_the_formula_says():
    """Simulated with the project's own decisions: LRU, one sequence, independent
    routing."""
    from vllm.model_executor.layers.fused_moe.expert_slots.config import (
        MoEPrefetchConfig,
    )
    from vllm.model_executor.layers.fused_moe.expert_slots.cpu.manager import (
        CPUSlotManager,
    )

    experts, top_k, slots, steps = 32, 4, 12, 3000
    home = {"w": torch.zeros(experts, 1)}
    rows = ExpertRows(ExpertStore(home), slots, CPUMemory())
    manager = CPUSlotManager(MoEPrefetchConfig(slots=slots), rows)
    torch.manual_seed(0)
    for _ in range(steps):
        manager.step(torch.randperm(experts)[None, :top_k])
    expected = link_cost(1.0, [(experts, top_k, slots, 4)]).bytes_per_token
    assert manager.counters.bytes_loaded / steps == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(
    ("speed", "layers", "said", "unsaid"),
    [
        (
            3.2e9,
            48,
            ["3.20 GB/s; PCIe 3.0 x16", "pcie.link.width", "about 1.0 tokens/s"],
            [],
        ),
        (12.5e9, 48, ["about 3.9 tokens/s", "--cpu-offload-gb"], ["pcie.link"]),
        (6e9, 4, ["6.00 GB/s; PCIe 3.0 x16"], ["tokens/s"]),
    ],
    ids=["both", "few tokens", "slow link, small model"],
)
def test_a_link_that_is_too_slow_is_said_in_one_line(speed, layers, said, unsaid):
    """Below 10 GB/s, and below 5 tokens a second: each by itself, with figures."""
    warning = link_cost(speed, [QWEN3_30B] * layers).warning()
    assert all(words in warning for words in said) and "\n" not in warning
    assert not any(words in warning for words in unsaid)


def test_the_limits_of_the_warning():
    """At 10 GB/s and at 5 tokens a second there is none."""
    assert link_cost(10e9, [(2, 1, 1, 1000)]).warning() is None
    assert link_cost(9.99e9, [(2, 1, 1, 1000)]).warning() is not None
    token = 20e9 / 5  # bytes of a fifth of a second
    assert link_cost(20e9, [(2, 2, 1, int(token))]).warning() is None
    assert link_cost(20e9, [(2, 2, 1, int(token * 1.01))]).warning() is not None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("25GB/s", 25_000_000_000),
        ("25 GiB/s", 25 << 30),
        (" 12.5 gb / S ", 12_500_000_000),
        ("800MB", 800_000_000),
    ],
)
def test_a_bandwidth_is_read(text, value):
    assert bandwidth(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "25",
        "25e9",
        "25,5GB/s",
        "1..2GB/s",
        "25GB/sec",
        "0GB/s",
        "-3GB/s",
        "25 GT/s",
    ],
)
def test_what_is_no_bandwidth_is_refused(text):
    """A number without a unit is refused too."""
    with pytest.raises(
        argparse.ArgumentTypeError, match="is not a bandwidth like 25GB/s"
    ):
        bandwidth(text)


def links_on_metrics():
    return [
        sample.value
        for family in REGISTRY.collect()
        for sample in family.samples
        if sample.name == "vllm:moe_prefetch_link_bytes_per_second"
    ]


def test_the_engine_says_it_and_answers_the_same(checkpoint, monkeypatch, request):
    """An engine that believes it is on CUDA measures after its slots are made. It says
    the cost and what is missing of the GPU's memory, and /metrics has the link. Its
    slots and answers are those of one that does not."""
    from tests.support.engine import answers, moe_layers, sampling, start

    def ask():
        llm = start(checkpoint, slots=4)
        held = [layer.slot_manager.residency() for layer in moe_layers(llm)]
        for layer in moe_layers(llm):
            for name, slots in layer.slot_manager.rows.slot_rows.items():
                home = layer.slot_manager.store.tensors[name]
                assert torch.equal(slots, home[layer.slot_manager.residency()])
        outputs = llm.generate(["You may reproduce", "a"], sampling(8), use_tqdm=False)
        return held, answers(outputs)

    plain = ask()
    assert not links_on_metrics()
    caplog = request.getfixturevalue(
        "caplog_vllm"
    )  # an engine sets vLLM's logging up anew, once
    free = iter([30 << 30, 20 << 30])
    use = SimpleNamespace(total_memory=32 << 30, torch_memory=0)
    cuda = SimpleNamespace(
        is_cuda=lambda: True,
        is_cpu=lambda: True,
        is_integrated_gpu=lambda device: False,
    )
    monkeypatch.setattr(report, "current_platform", cuda)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(
        report,
        "MemorySnapshot",
        lambda: SimpleNamespace(**vars(use), free_memory=next(free)),
    )
    monkeypatch.setattr(link, "_LEAST", 1)
    assert ask() == plain
    [bandwidth] = links_on_metrics()
    assert bandwidth > 0
    assert next(free, None) is None
    (line,) = {m for m in caplog.messages if "/s measured; an expert of" in m}
    assert line.startswith("Host-to-device: ") and "tokens/s" in line
    assert "20.00 GiB of GPU memory are free after loading" in caplog.text


def test_a_gpu_that_shares_the_hosts_memory_is_not_compared(monkeypatch):
    cuda = SimpleNamespace(
        is_cuda=lambda: True, is_integrated_gpu=lambda device: device == 3
    )
    monkeypatch.setattr(report, "current_platform", cuda)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 3)
    assert report.device_use(None) is None


def test_what_the_device_holds(monkeypatch):
    """Torch's memory and the rows of every layer, which torch does not know; shared
    rows once."""

    class Memory:
        def __init__(self, committed):
            self.committed = committed

    def layer(memory):
        return SimpleNamespace(
            slot_manager=SimpleNamespace(rows=SimpleNamespace(memory=memory))
        )

    memory, other = Memory(100), Memory(7)
    monkeypatch.setattr(
        report,
        "all_slotted_layers",
        lambda _: [layer(memory), layer(memory), layer(other)],
    )
    cuda = SimpleNamespace(is_cuda=lambda: True, is_integrated_gpu=lambda device: False)
    monkeypatch.setattr(report, "current_platform", cuda)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    snapshot = SimpleNamespace(total_memory=1000, free_memory=500, torch_memory=20)
    monkeypatch.setattr(report, "MemorySnapshot", lambda: snapshot)
    assert report.device_use(None) == report.DeviceUse(1000, 500, 127)
