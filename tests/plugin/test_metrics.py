# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""/metrics and the periodic line, on counter files and on vLLM's own route and loggers,
without an engine. With engines: `engine/test_engine.py`, `engine/test_server.py`,
`compatibility/test_layouts.py`, `examples/test_grafana.py`."""

import logging
from contextlib import suppress
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from vllm.entrypoints.serve.instrumentator.metrics import attach_router
from vllm.v1.metrics.loggers import LoggingStatLogger

from vllm.model_executor.layers.fused_moe.expert_slots.counters import (
    DIRECTORY_VARIABLE,
    SlotCounters,
)
from vllm.model_executor.layers.fused_moe.expert_slots.decisions.step import StepPlan
from vllm.plugins.moe_gpu_prefetch import log_line, metrics
from vllm.plugins.moe_gpu_prefetch.log_line import SlotLine

LAYER = "model.layers.{}.mlp.experts"
BYTES = 10_000_000
MODEL = SimpleNamespace(model_config=SimpleNamespace(served_model_name="m"))
"""What `/metrics` reads of an engine's configuration."""


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """Where workers of this process count."""
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path))
    return tmp_path


def rank(number, replica=False, layers=2, bytes_per_expert=BYTES):
    """The counters of a rank's layers."""
    return [
        SlotCounters(LAYER.format(n), number, 4, bytes_per_expert, 8, replica)
        for n in range(layers)
    ]


def step(counters, needed, hits, staged=0):
    counters.add(StepPlan(needed, hits, staged, *[None] * 2))


def samples(collector):
    """Values by name and labels."""
    registry = CollectorRegistry()
    registry.register(collector)
    return {
        (sample.name.removeprefix("vllm:moe_prefetch_"), *sample.labels.values()): (
            sample.value
        )
        for family in registry.collect()
        for sample in family.samples
    }


def total(found, name):
    return sum(value for key, value in found.items() if key[0] == name)


def test_ranks_of_tensor_parallelism_are_counted_once(directory):
    """A sum over all samples is right: events once, bytes of both shards."""
    for counters in (*rank(0), *rank(1, replica=True)):
        step(counters, needed=6, hits=2, staged=1)
    found = samples(metrics.SlotCollector(directory, "m"))
    assert total(found, "steps_total") == 2 and total(found, "loads_total") == 8
    assert total(found, "slots") == 8 and total(found, "experts") == 16
    assert total(found, "bytes_loaded_total") == 2 * 8 * BYTES
    assert total(found, "slot_bytes") == 2 * 2 * 4 * BYTES
    assert total(found, "store_bytes") == 2 * 2 * 8 * BYTES


def test_ranks_with_experts_of_their_own_each_count(directory):
    """Expert parallelism, and stages of a pipeline."""
    for counters in (*rank(0), *rank(1)):
        step(counters, needed=6, hits=2)
    found = samples(metrics.SlotCollector(directory, "m"))
    assert total(found, "steps_total") == 4 and total(found, "slots") == 16


def test_the_link_is_there_once_it_was_measured(directory):
    """Of each rank, and never as 0."""
    measured, other = rank(0), rank(1)
    collector = metrics.SlotCollector(directory, "m")
    assert total(samples(collector), "link_bytes_per_second") == 0
    assert not [key for key in samples(collector) if key[0].startswith("link")]
    for counters in measured:
        counters.set_link(25e9)
    assert samples(collector)["link_bytes_per_second", "m", "0"] == 25e9
    assert ("link_bytes_per_second", "m", "1") not in samples(collector)
    other[0].set_link(12e9)
    assert samples(collector)["link_bytes_per_second", "m", "1"] == 12e9


def scraped():
    """What vLLM's own route answers."""
    app = FastAPI()
    attach_router(app)
    text = TestClient(app).get("/metrics").text
    return {
        family.name: sum(sample.value for sample in family.samples)
        for family in text_string_to_metric_families(text)
        if family.samples
    }


@pytest.fixture
def shown(monkeypatch):
    """After the test this process's registry is as it was before."""
    before = metrics._exposed
    if before is not None:
        with suppress(KeyError):
            metrics.REGISTRY.unregister(before)
    monkeypatch.setattr(metrics, "_exposed", None)
    yield
    if metrics._exposed is not None:
        metrics.REGISTRY.unregister(metrics._exposed)
    if before is not None:
        metrics.REGISTRY.register(before)


def test_the_route_shows_the_newest_engine_of_a_process(tmp_path, monkeypatch, shown):
    """An engine that starts later takes the place of the one before."""
    for engine, needed in (("first", 3), ("second", 5)):
        place = tmp_path / engine
        place.mkdir()
        monkeypatch.setenv(DIRECTORY_VARIABLE, str(place))
        step(rank(0, layers=1)[0], needed=needed, hits=needed)
        metrics.show(place, MODEL)
        assert scraped()["vllm:moe_prefetch_needed"] == needed
    for path in place.iterdir():
        path.unlink()
    place.rmdir()
    assert "vllm:moe_prefetch_needed" not in scraped()


SEVERAL_SERVERS = """
from pathlib import Path
from tests.plugin.test_metrics import MODEL, rank, scraped, step
from vllm.plugins.moe_gpu_prefetch import metrics
[counters] = rank(0, layers=1)
metrics.show(Path({place!r}), MODEL)
metrics.show(Path({place!r}), MODEL)  # an engine that starts later
for hits in (1, 2):
    step(counters, needed=5, hits=hits, staged=1)
    found = scraped()
    assert found["vllm:moe_prefetch_needed"] == counters.needed, found
    assert found["vllm:moe_prefetch_slots"] == 4, found
"""


def test_several_api_servers_show_them_too(fresh, tmp_path):
    """Each scrape has a registry of its own there. `examples/test_grafana.py` does this
    with a server."""
    place, shared = tmp_path / "counters", tmp_path / "prometheus"
    for made in (place, shared):
        made.mkdir()
    variables = {
        DIRECTORY_VARIABLE: str(place),
        "PROMETHEUS_MULTIPROC_DIR": str(shared),
    }
    ended = fresh(SEVERAL_SERVERS.format(place=str(place)), **variables)
    assert ended.status == 0, ended.output


def test_the_rust_front_end_is_said_to_lack_them(
    directory, monkeypatch, shown, caplog_vllm
):
    """It answers /metrics without Python."""
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    parallel = {
        "distributed_executor_backend": "mp",
        "data_parallel_backend": "mp",
        "nnodes": 1,
    }
    metrics.expose(
        directory,
        SimpleNamespace(
            parallel_config=SimpleNamespace(**parallel),
            **vars(MODEL),
        ),
    )
    assert "Rust front end" in caplog_vllm.text


def test_the_line_says_what_happened_since_the_one_before(directory):
    first, second = rank(0)
    line = SlotLine(directory)
    assert line.text(10) is None
    for _ in range(10):
        step(first, needed=6, hits=6)
        step(second, needed=6, hits=3, staged=1)
    assert line.text(0.1) == (
        "Expert slots: 75.0% hits (worst layer 1: 50.0%), 1.50 loads per layer and "
        "step, 33.3% of them staged, 3 GB/s host-to-device."
    )
    assert line.text(10) is None
    step(first, needed=4, hits=4)
    assert line.text(10) == "Expert slots: 100.0% hits, no loads."


def test_the_line_of_two_ranks(directory):
    """Events of tensor parallelism count once, bytes of both, over both links. A layer
    of the draft has no measurement."""
    ranks = rank(0, layers=1), rank(1, replica=True, layers=1)
    for [counters] in ranks:
        counters.set_link(25e9)
        step(counters, needed=6, hits=1, staged=2)
    SlotCounters("draft", 0, 4, BYTES, 8)
    assert SlotLine(directory).text(0.1) == (
        "Expert slots: 16.7% hits, 5.00 loads per layer and step, 40.0% of them "
        "staged, 1 GB/s host-to-device (2.0% of 50.0 GB/s of 2 ranks)."
    )


@pytest.mark.parametrize(
    ("layer", "number"),
    [
        ("model.layers.17.mlp.experts", "17"),
        ("model.layers.3.mtp.1.experts", "model.layers.3.mtp.1.experts"),
        ("experts", "experts"),
    ],
)
def test_a_layer_is_named_by_its_number(layer, number):
    assert log_line._number(layer) == number


def test_the_line_follows_the_logger_of_its_engine(directory, caplog_vllm):
    """Not that of another engine in the process, and not while nothing happens or
    vLLM takes the engine for idle."""
    [counters] = rank(0, layers=1)
    log_line.follow(directory, "slotted")
    loggers = [logger_of(instance) for instance in ("slotted", "stock")]
    for tokens, steps, lines in ((0, 1, 0), (9, 1, 1), (9, 0, 0), (9, 2, 1)):
        caplog_vllm.clear()
        for _ in range(steps):
            step(counters, needed=4, hits=3)
        for logger in loggers:
            logger.num_generation_tokens = tokens
        with caplog_vllm.at_level(logging.INFO, "vllm"):
            for logger in loggers:
                logger.log()
        assert caplog_vllm.text.count("Expert slots: 75.0% hits") == lines


def logger_of(instance):
    """vLLM's, of an engine that is idle."""
    model = SimpleNamespace(is_diffusion=False)
    off = SimpleNamespace(cudagraph_metrics=False, enable_mfu_metrics=False)
    config = SimpleNamespace(
        instance_id=instance,
        device_config=SimpleNamespace(device_type="cpu"),
        model_config=model,
        kv_transfer_config=None,
        ec_transfer_config=None,
        observability_config=off,
    )
    return LoggingStatLogger(config)
