# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a recorder writes is what was decided, also after a kill, a gap or a full
file."""

import logging
import os
import time

import numpy as np
import pytest
import torch

from tests.decisions.test_manager import make_manager
from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError
from vllm.model_executor.layers.fused_moe.expert_slots.counters import TOTALS
from vllm.model_executor.layers.fused_moe.expert_slots.decisions.policy import Ranking
from vllm.model_executor.layers.fused_moe.expert_slots.trace import format, recorder
from vllm.model_executor.layers.fused_moe.expert_slots.trace.reading import Trace
from vllm.model_executor.layers.fused_moe.expert_slots.trace.ring import RECORDS

E, N = 40, 8


def header_of(managers, start=None):
    return format.Header(
        model="a model",
        rank=0,
        platform="cpu",
        vllm="0",
        max_num_seqs=16,
        link=2.5e10,
        kv_bytes_per_token=1024.0,
        layers=[
            format.LayerHeader(
                name=name,
                num_experts=E,
                num_slots=N,
                top_k=2,
                routed=2.0,
                bytes_per_expert=manager.store.bytes_per_expert,
                policy="lru",
                lfu_half_life=4,
                experts=start.experts if start else None,
                counts=start.counts if start else None,
            )
            for name, manager in managers.items()
        ],
    )


def record(path, limit, managers, start=None):
    layers = {name: (m.ring, m.counters) for name, m in managers.items()}
    return recorder.TraceRecorder(path, limit, header_of(managers, start), layers)


class Recorded:
    """Two layers and their recorder, whose thread does nothing: the tests look and
    flush."""

    def __init__(self, path, limit=1 << 20):
        self.path = path
        self.managers = {
            f"layer {n}": make_manager(E, N, "lru", traced=True) for n in range(2)
        }
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(recorder.TraceRecorder, "_run", lambda self: None)
            self.recorder = record(path, limit, self.managers)
        self.needed = {name: [] for name in self.managers}
        self._generator = torch.Generator().manual_seed(0)

    def steps(self, count, tokens=3):
        for _ in range(count):
            for name, manager in self.managers.items():
                ids = torch.rand(tokens, E, generator=self._generator).topk(2).indices
                manager.step(ids.to(torch.int32))
                self.needed[name].append(ids.unique().tolist())

    def flush(self):
        for _ in range(2):
            self.recorder._look()
        self.recorder._flush()

    def check(self, trace, steps):
        for layer in trace.layers:
            assert layer.steps.tolist() == list(range(1, steps + 1))
            parts = np.split(layer.experts, layer.offsets[1:-1])
            assert [p.tolist() for p in parts] == self.needed[layer.name][:steps]
            assert set(layer.rows.tolist()) == {6}


@pytest.fixture
def recorded(tmp_path):
    made = Recorded(tmp_path / "a.trace")
    yield made
    made.recorder.close()


def test_a_closed_trace_has_every_step_and_the_engines_counters(recorded):
    recorded.steps(30)
    recorded.managers["layer 0"].step(torch.full((2, 2), -1, dtype=torch.int32))
    recorded.recorder.close()
    recorded.recorder.close()
    trace = Trace.read(recorded.path)
    assert trace.complete and trace.link == 2.5e10 and trace.max_num_seqs == 16
    assert os.stat(recorded.path).st_mode & 0o777 == 0o600
    recorded.check(trace, 30)
    for layer in trace.layers:
        counted = recorded.managers[layer.name].counters.as_dict()
        assert layer.totals == {name: counted[name] for name in TOTALS}
        assert layer.lost == 0 and layer.totals["misses"] > 0


def test_a_trace_that_was_cut_off_is_read_to_its_last_whole_frame(recorded):
    recorded.steps(10)
    recorded.flush()
    whole = recorded.path.stat().st_size
    recorded.steps(5)
    recorded.recorder.close()
    data = recorded.path.read_bytes()
    last = len(format.frame(format.END, b'{"reason":"closed"}'))
    for length in {whole, whole + 1, whole + 40, len(data) - last - 1}:
        recorded.path.write_bytes(data[:length])
        trace = Trace.read(recorded.path)
        assert trace.ended == "interrupted" and not trace.complete
        # The counters are those of the moment, or none.
        for layer in trace.layers:
            assert layer.totals is None or layer.totals["steps"] == len(layer.steps)
    for tail in (b"\0" * 500, data[whole : whole + 5]):
        recorded.path.write_bytes(data[:whole] + tail)
        recorded.check(Trace.read(recorded.path), 10)
    recorded.path.write_bytes(data[:whole])
    recorded.check(Trace.read(recorded.path), 10)
    assert all(layer.totals for layer in Trace.read(recorded.path).layers)


def test_the_reader_waits_one_look_for_a_gpus_writes(recorded):
    recorded.steps(3)
    assert recorded.recorder._look()
    readers = recorded.recorder._readers.values()
    assert not any(reader.pending for reader in readers)
    assert not recorded.recorder._look()
    assert [reader.pending for reader in readers] == [3, 3]


def test_steps_that_were_overwritten_are_a_gap(recorded):
    """And so is a record of another number, which a step under way may leave."""
    recorded.steps(2)
    recorded.flush()
    recorded.steps(RECORDS + 100, tokens=1)
    recorded.recorder.close()
    layer = Trace.read(recorded.path).layers[0]
    assert layer.steps[:2].tolist() == [1, 2] and layer.steps[2] > 100
    assert layer.steps[-1] == RECORDS + 102
    assert layer.lost == RECORDS + 102 - len(layer.steps) > 100
    parts = np.split(layer.experts, layer.offsets[1:-1])
    assert [p.tolist() for p in parts[2:]] == [
        recorded.needed["layer 0"][step - 1] for step in layer.steps[2:]
    ]


def test_a_record_of_another_step_is_not_read(recorded):
    recorded.steps(6)
    ring = recorded.managers["layer 0"].ring
    ring.tensor[3, 0] = 77
    recorded.recorder.close()
    layer, other = Trace.read(recorded.path).layers
    assert layer.steps.tolist() == [5, 6] and layer.lost == 4
    assert other.lost == 0


def test_a_step_under_way_is_in_no_state(recorded):
    """A GPU writes its counters piece by piece. A state has those of one moment, which
    is that of the last step that was read, while the engine goes on."""
    recorded.steps(4)
    recorded.recorder._look()
    before = recorded.managers["layer 0"].counters.as_dict()
    recorded.steps(3)
    counters = recorded.managers["layer 1"].counters
    counters.tensor[list(TOTALS).index("hits")] -= 1
    recorded.recorder._look()
    recorded.recorder._flush()
    layer, other = Trace.read(recorded.path).layers
    assert layer.totals == {name: before[name] for name in TOTALS}
    assert layer.totals["steps"] == 4 == len(other.steps) and other.totals
    recorded.flush()
    layer, other = Trace.read(recorded.path).layers
    assert layer.totals["steps"] == 7 and other.totals is None
    counters.tensor[list(TOTALS).index("hits")] += 1


def test_seconds_are_those_of_steps(recorded, monkeypatch):
    """A pause of a second is one; a shorter one is a slow step."""
    now = [100.0]
    monkeypatch.setattr(recorder.time, "monotonic", lambda: now[0])
    for pause in (0.0, 0.3, 0.7, 5.0, 0.2):
        now[0] += pause
        recorded.steps(1)
        recorded.recorder._look()
    recorded.flush()
    first, again = recorder.POLL_S, recorder.POLL_S
    assert Trace.read(recorded.path).busy_seconds == pytest.approx(
        first + 0.3 + 0.7 + again + 0.2
    )


def test_the_recording_ends_at_its_limit(tmp_path, caplog, monkeypatch):
    """The counters are those after the last step that was written."""
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    recorded = Recorded(tmp_path / "a.trace", limit=4000)
    for _ in range(100):
        recorded.steps(20)
        recorded.flush()
    assert not recorded.recorder.recording
    recorded.steps(5)
    recorded.recorder.close()
    trace = Trace.read(recorded.path)
    assert trace.ended == "limit" and recorded.path.stat().st_size <= 4000
    steps = len(trace.layers[0].steps)
    assert steps >= 20 and trace.layers[0].totals["steps"] == steps
    recorded.check(trace, steps)
    assert "has reached its limit" in caplog.text and "trace_limit" in caplog.text


@pytest.mark.parametrize("trouble", ["full", "reset"])
def test_trouble_ends_the_recording_and_not_the_engine(
    tmp_path, caplog, monkeypatch, trouble
):
    """A full disk; slots that are reset."""
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    if trouble == "full":
        full = os.open("/dev/full", os.O_WRONLY)
        monkeypatch.setattr(recorder, "create_trace", lambda path: full)
    recorded = Recorded(tmp_path / "a.trace")
    recorded.steps(2)
    recorded.recorder._look()
    if trouble == "reset":
        for manager in recorded.managers.values():
            manager.reset()
            assert not manager.ring.tensor.any()
    recorded.recorder.close()
    recorded.recorder.close()
    assert f"Trace: the recording of {tmp_path / 'a.trace'} ends: " in caplog.text
    assert len({m for m in caplog.messages if m.startswith("Trace:")}) == 1


def test_the_thread_writes_when_the_engine_is_idle(tmp_path):
    managers = {"layer 0": make_manager(E, N, "lru", traced=True)}
    path = tmp_path / "a.trace"
    made = record(path, 1 << 20, managers)
    managers["layer 0"].step(torch.tensor([[3, 9]], dtype=torch.int32))
    until = time.monotonic() + 60
    while not (layer := Trace.read(path).layers[0]).totals:
        assert time.monotonic() < until
        time.sleep(0.05)
    assert layer.experts.tolist() == [3, 9] and Trace.read(path).busy_seconds > 0
    made.close()


def test_the_start_of_the_slots_is_kept(tmp_path):
    managers = {"layer 0": make_manager(E, N, "lru", traced=True)}
    start = Ranking([5, 9, *range(20, 26)], [7] * N)
    path = tmp_path / "a.trace"
    record(path, 1 << 20, managers, start).close()
    layer = Trace.read(path).layers[0]
    assert layer.start == start and len(layer.steps) == 0 and layer.lost == 0


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda data: b"GGUF" + data, "not a trace of this version"),
        (lambda data: data[: len(format.MAGIC)], "it ends before its header"),
        (lambda data: data[:200] + b"\0" + data[201:], "is damaged"),
        (
            lambda data: format.MAGIC + format.frame(format.STEPS, b"", 0, 0, 1),
            "it has no header",
        ),
        (
            lambda data: format.MAGIC + format.frame(format.HEADER, b"{}"),
            "Field required",
        ),
        (
            lambda data: data + format.frame(format.STEPS, b"x", 9, 1, 1),
            "steps of a layer 9",
        ),
        (lambda data: data + format.frame(format.STEPS, b"x", 0, 0, 9), "damaged"),
        (
            lambda data: data + format.frame(format.STEPS, b"x", 0, 1 << 31, 1 << 63),
            "follows 2",
        ),
        (
            lambda data: (
                data
                + format.frame(
                    format.STEPS, format.zlib.compress(bytes(1 << 27)), 0, 1, 9
                )
            ),
            "a frame is too long",
        ),
        (
            lambda data: (
                data
                + format.frame(
                    format.STATE,
                    format.zlib.compress(b'{"busy_seconds": 0, "totals": {"a": {}}}'),
                )
            ),
            "those of another version",
        ),
        (
            lambda data: data + format.frame(format.STEPS, b"12345", 0, 1, 99),
            "incorrect header check",
        ),
    ],
)
def test_what_is_no_trace_is_refused_in_one_line(recorded, spoil, reason):
    recorded.steps(2)
    recorded.recorder.close()
    recorded.path.write_bytes(spoil(recorded.path.read_bytes()))
    with pytest.raises(MoEPrefetchError) as refusal:
        Trace.read(recorded.path)
    message = str(refusal.value)
    assert reason in message and str(recorded.path) in message and "\n" not in message
