# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A real Prometheus scrapes a real server with several API servers, and every panel of
the dashboard shows data. Queries in the docs are the panels'."""

import http.client
import itertools
import json
import re
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from tests.docs.commands import blocks
from tests.support import ROOT
from tests.support.prometheus import (
    BINARY,
    GRAFANA,
    dashboard,
    filled_in,
    panels,
    scraping,
)
from tests.support.server import Server, serving
from tools.draw_panels import draw
from vllm.model_executor.layers.fused_moe.expert_slots import counters
from vllm.model_executor.layers.fused_moe.expert_slots.counters import SIZES, TOTALS

LINK = 10**10
"""Bytes a second, written where an engine on a GPU writes what it has measured."""

API_SERVERS = 2
ARGUMENTS = (
    *("--max-model-len", "512", "--enforce-eager", "--max-num-batched-tokens", "256"),
    *("--moe-gpu-prefetch", "8", "--api-server-count", str(API_SERVERS)),
)
PREFIX = "vllm:moe_prefetch_"
OURS = {f"{name}_total" for name in TOTALS} | {*SIZES, "link_bytes_per_second"}

needs_prometheus = pytest.mark.skipif(
    BINARY is None, reason="Prometheus is not installed (apt-get install prometheus)"
)


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    log = tmp_path_factory.mktemp("api-servers") / "log"
    with serving(checkpoint, log, *ARGUMENTS) as server:
        [directory] = server.counter_directories()
        for path in directory.glob("*@*"):
            np.memmap(path, np.int64, "r+")[counters._LINK] = LINK
        yield server


def ask(server: Server, number: int) -> None:
    server.client().completions.create(
        model="sample",
        prompt=f"{number}. You may reproduce and distribute copies of the Work " * 3,
        max_tokens=24,
        extra_body={"ignore_eos": True},
    )


def scrape(server: Server) -> tuple[http.client.HTTPConnection, list[str]]:
    """Our samples of /metrics, and the connection, which stays open."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=30)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    return connection, [line for line in text.splitlines() if line.startswith(PREFIX)]


def answering(server: Server, connection: http.client.HTTPConnection) -> set[int]:
    """The process of the server at the other end of an open connection."""
    port = connection.sock.getsockname()[1]
    return {
        process.pid
        for process in server.tree()
        for found in process.net_connections("tcp4")
        if found.raddr and found.raddr.port == port
    }


def test_each_api_server_reports_the_same_totals(server):
    """Whichever of them answers. An open connection makes a server the less likely one
    to accept the next, and one may start later than the other."""
    ask(server, 1)
    open_, answered, scrapes = [], set(), set()
    for _ in range(300):
        connection, samples = scrape(server)
        open_.append(connection)
        answered |= answering(server, connection)
        scrapes.add(tuple(samples))
        if len(answered) == API_SERVERS:
            break
        time.sleep(0.2)
    for connection in open_:
        connection.close()
    assert len(answered) == API_SERVERS and len(scrapes) == 1
    totals = server.metrics()
    assert totals[f"{PREFIX}slots"] == 4 * 8 and totals[f"{PREFIX}experts"] == 4 * 32
    assert totals[f"{PREFIX}loads_total"] > 0
    assert totals["vllm:generation_tokens_total"] >= 24


@needs_prometheus
def test_every_panel_shows_data(server, tmp_path):
    """Finite values, and shares between 0 and 1, once requests were answered. The
    picture of the docs can be drawn of them."""
    with scraping(server, tmp_path / "prometheus") as prometheus:
        begin = time.time()
        for number in itertools.count(2):
            ask(server, number)
            missing = {
                query
                for panel in panels()
                for query in panel.targets
                if not prometheus.series(
                    replace(panel, targets=(query,)), begin, time.time()
                )
            }
            if not missing or number > 100:
                break
        assert not missing
        shown = {p: prometheus.series(p, begin, time.time()) for p in panels()}
        for panel, series in shown.items():
            values = [value for points in series.values() for _, value in points]
            assert panel.unit != "percentunit" or all(0 <= v <= 1 for v in values)
        [by_layer] = [p for p in shown if p.kind == "table"]
        draw(shown, tmp_path / "panels.png")
        assert (tmp_path / "panels.png").stat().st_size > 20_000
        assert set(shown[by_layer]) == {
            f"model.layers.{n}.mlp.experts" for n in range(4)
        }


@needs_prometheus
def test_prometheus_takes_the_scrape_config():
    check = ["promtool", "check", "config", str(GRAFANA / "prometheus.yml")]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_dashboard_is_one_that_can_be_imported():
    """It asks for its data source and model. Panels do not overlap, and each has a
    unit, a description and queries."""
    board = dashboard()
    assert board["uid"] and board["title"] and board["schemaVersion"]
    variables = {each["name"]: each for each in board["templating"]["list"]}
    assert {name: each["type"] for name, each in variables.items()} == {
        "datasource": "datasource",
        "model_name": "query",
    }
    source = {"type": "prometheus", "uid": "${datasource}"}
    assert variables["datasource"]["query"] == "prometheus"
    assert variables["model_name"]["datasource"] == source
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    taken = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = set(
            itertools.product(
                range(place["x"], place["x"] + place["w"]),
                range(place["y"], place["y"] + place["h"]),
            )
        )
        assert place["x"] + place["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] == "row":
            continue
        assert panel["datasource"] == source and panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["targets"]
        for target in panel["targets"]:
            assert target["datasource"] == source
            assert '{model_name=~"$model_name"}' in target["expr"]
            assert target["legendFormat"]


def test_grafanas_schema_has_every_field():
    """Grafana's own library knows each and gives it back."""
    plugins.register_default_plugins()
    read_back = JSONEncoder().encode(Dashboard.from_json(dashboard()))
    assert within(dashboard(), json.loads(read_back))


def within(part: object, whole: object) -> bool:
    """Whether a value of JSON has all of `part`; it may have more fields."""
    if isinstance(part, dict) and isinstance(whole, dict):
        return all(k in whole and within(v, whole[k]) for k, v in part.items())
    if isinstance(part, list) and isinstance(whole, list):
        return len(part) == len(whole) and all(map(within, part, whole))
    return part == whole


def test_panels_ask_for_metrics_that_there_are():
    asked = {
        name
        for panel in panels()
        for query, _ in panel.targets
        for name in re.findall(rf"{PREFIX}(\w+)", query)
    }
    assert asked and asked <= OURS


def test_the_docs_have_the_panels_queries():
    """All of them and no other."""
    page = ROOT / "docs" / "observability.md"
    lines = page.read_text(encoding="utf-8").splitlines()
    written = {
        query
        for _, block, _ in blocks(lines)
        if block[0].startswith(("sum", "avg", "max"))
        for query in re.split(r"\n(?=\w)", "\n".join(block))
    }
    selector = '{model_name=~"$model_name"}'
    asked = {
        filled_in(query.replace(selector, ""), "5m")
        for panel in panels()
        for query, _ in panel.targets
    }
    assert {" ".join(query.split()) for query in written} == asked


def test_compose_mounts_what_is_there():
    """Grafana finds Prometheus and the dashboard, and Prometheus its config and the
    server."""
    services = yaml.safe_load((ROOT / "examples" / "compose.yaml").read_text())
    services = services["services"]
    mounts = {}
    for name in ("prometheus", "grafana"):
        assert services[name]["profiles"] == ["metrics"]
        for volume in services[name]["volumes"]:
            place, target, *_ = volume.split(":")
            if place.startswith("."):
                assert (ROOT / "examples" / place).exists(), place
                mounts[name, target] = ROOT / "examples" / place
    assert mounts["prometheus", "/etc/prometheus/prometheus.yml"].samefile(
        GRAFANA / "prometheus.yml"
    )
    provisioning = GRAFANA / "provisioning"
    assert mounts["grafana", "/etc/grafana/provisioning"].samefile(provisioning)
    provider = read(provisioning / "dashboards" / "expert-slots.yml")["providers"][0]
    folder = provider["options"]["path"]
    assert mounts["grafana", f"{folder}/expert-slots.json"].samefile(
        GRAFANA / "dashboard.json"
    )
    source = read(provisioning / "datasources" / "prometheus.yml")["datasources"][0]
    assert source["url"] == "http://prometheus:9090"
    config = read(GRAFANA / "prometheus.yml")
    assert source["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]
    [job] = config["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["vllm:8000"]}]
    assert "vllm" in services


def read(path: Path) -> dict:
    return yaml.safe_load(path.read_text())
