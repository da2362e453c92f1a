# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The real Prometheus with the scrape config of the examples, and the panels of their
dashboard; for tests and for the picture of the docs."""

import json
import math
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx

from tests.support import ROOT
from tests.support.server import Server

GRAFANA = ROOT / "examples" / "grafana"
BINARY = shutil.which("prometheus")
WINDOW_S = 10
"""Of rates, in the place of Grafana's own choice; ten scrapes."""

Series = dict[str, list[tuple[float, float]]]
"""Times, in seconds since 1970, and finite values, by the labels as they are shown."""


@dataclass(frozen=True)
class Panel:
    """A panel of the dashboard, as far as a query and its picture need it.

    Attributes:
        targets: a query and the text of its series, each.
    """

    title: str
    kind: str
    description: str
    unit: str
    targets: tuple[tuple[str, str], ...]


def dashboard() -> dict[str, Any]:
    return json.loads((GRAFANA / "dashboard.json").read_text())


@cache
def panels() -> tuple[Panel, ...]:
    """All but the rows."""
    return tuple(
        Panel(
            panel["title"],
            panel["type"],
            panel["description"],
            panel["fieldConfig"]["defaults"]["unit"],
            tuple((t["expr"], t["legendFormat"]) for t in panel["targets"]),
        )
        for panel in dashboard()["panels"]
        if panel["type"] != "row"
    )


def filled_in(query: str, window: str = f"{WINDOW_S}s") -> str:
    """A panel's query as Grafana sends it, for all models."""
    return query.replace("$__rate_interval", window).replace("$model_name", ".*")


@dataclass
class Prometheus:
    """A running server that scrapes one vLLM."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def _get(self, path: str, **parameters: Any) -> list[Any]:
        answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=30)
        body = answer.json()
        assert body["status"] == "success", body
        return body["data"]["result"]

    def value(self, query: str) -> float | None:
        """What a query without labels gives now; None for nothing."""
        found = self._get("query", query=query)
        return float(found[0]["value"][1]) if found else None

    def series(self, panel: Panel, begin: float, end: float) -> Series:
        """What the panel shows between two times, at each second."""
        shown: Series = {}
        for query, legend in panel.targets:
            found = self._get(
                "query_range", query=filled_in(query), start=begin, end=end, step=1
            )
            for one in found:
                text = legend
                for name, label in one["metric"].items():
                    text = text.replace(f"{{{{{name}}}}}", label)
                points = [(float(at), float(value)) for at, value in one["values"]]
                finite = [point for point in points if math.isfinite(point[1])]
                if finite:
                    shown[text] = finite
        return shown


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def scraping(server: Server, directory: Path) -> Iterator[Prometheus]:
    """Prometheus, scraping `server` each second by the config of the examples. It keeps
    what it needs in `directory`, a new one.

    Raises:
        RuntimeError: it has not scraped the server; carries its log.
    """
    assert BINARY is not None
    text = (GRAFANA / "prometheus.yml").read_text()
    here = {
        "vllm:8000": server.url.removeprefix("http://"),
        "scrape_interval: 15s": "scrape_interval: 1s",
    }
    for example, ours in here.items():
        assert text.count(f" {example}") + text.count(f'"{example}"') == 1, example
        text = text.replace(f" {example}", f" {ours}")
        text = text.replace(f'"{example}"', f'"{ours}"')
    directory.mkdir()
    config, log, port = directory / "prometheus.yml", directory / "log", _free_port()
    config.write_text(text)
    command = [
        BINARY,
        f"--config.file={config}",
        f"--storage.tsdb.path={directory / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    prometheus = Prometheus(process, f"http://127.0.0.1:{port}", log)
    try:
        _wait(prometheus)
        yield prometheus
    finally:
        process.terminate()
        process.wait(30)


def _wait(prometheus: Prometheus, limit_s: float = 60) -> None:
    begin = time.monotonic()
    while True:
        try:
            if prometheus.value('up{job="vllm"}') == 1:
                return
        except (httpx.HTTPError, ValueError):
            pass  # it answers once it has started
        ended = prometheus.process.poll() is not None
        if ended or time.monotonic() - begin > limit_s:
            raise RuntimeError(prometheus.log.read_text(errors="replace")[-4000:])
        time.sleep(0.2)
