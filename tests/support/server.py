# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Starts the real `vllm serve` and waits until it answers; for tests, the demo and
benchmarks."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from openai import AsyncOpenAI, OpenAI

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


@dataclass
class Server:
    """A running server: its process, its log, and clients for it."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def client(self) -> OpenAI:
        return OpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120
        )

    def http(self, connections: int = 100) -> httpx.AsyncClient:
        """For many requests at once, over at most so many connections."""
        # One request a connection: the server closes an idle one at a moment of its
        # choosing, and a request that is sent just then is lost.
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=0)
        return httpx.AsyncClient(base_url=self.url, limits=limits, timeout=120)

    def async_client(self, http: httpx.AsyncClient) -> AsyncOpenAI:
        return AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0, http_client=http
        )

    def tree(self) -> list[psutil.Process]:
        """Its processes: the one that was started and all below it."""
        try:
            root = psutil.Process(self.process.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def counter_directories(self) -> set[Path]:
        """Those of expert slots that its processes have mapped."""
        maps = [area.path for process in self.tree() for area in process.memory_maps()]
        return {Path(path).parent for path in maps if "/vllm-expert-slots-" in path}

    def healthy(self) -> bool:
        return _healthy(self.url)

    def rpc(self, method: str) -> list[Any]:
        """What `method` of every worker answers; the server runs with
        VLLM_SERVER_DEV_MODE=1."""
        request = urllib.request.Request(
            f"{self.url}/collective_rpc",
            data=json.dumps({"method": method}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)["results"]

    def metrics(self) -> dict[str, float]:
        """Samples of /metrics summed over labels, by metric name."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as response:
            lines = response.read().decode().splitlines()
        totals: dict[str, float] = {}
        for line in lines:
            if not line.startswith("#"):
                name = line.split("{")[0].split()[0]
                totals[name] = totals.get(name, 0.0) + float(line.rsplit(" ", 1)[1])
        return totals


def alive(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Those that have not ended, waited for or not."""
    return [
        process
        for process in processes
        if process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as response:
            return response.status == 200
    except OSError:
        return False


def start(
    model: Path,
    log: Path,
    *arguments: str,
    command: Sequence[str] = (),
    **environment: str,
) -> Server:
    """Starts `vllm serve MODEL ARGUMENTS`, or `command` ARGUMENTS, on a free port of
    the loopback interface; `environment` comes on top of this process's."""
    port = _free_port()
    command = command or (
        str(Path(sys.executable).with_name("vllm")),
        "serve",
        str(model),
    )
    command = [*command, *arguments, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--served-model-name", "sample"]
    environment = {**os.environ, **ENVIRONMENT, **environment}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    return Server(process, f"http://127.0.0.1:{port}", log)


def wait(
    server: Server, limit_s: float = 300, tick: Callable[[float], None] | None = None
) -> None:
    """Waits until `server` answers; `tick` gets the seconds waited so far.

    Raises:
        RuntimeError: the server ended or did not answer in time; carries the end of its
            log.
    """
    begin = time.monotonic()
    while not _healthy(server.url):
        waited = time.monotonic() - begin
        if server.process.poll() is not None or waited > limit_s:
            tail = server.log.read_text(errors="replace")[-4000:]
            raise RuntimeError(
                f"vllm serve is not answering after {waited:.0f} s:\n{tail}"
            )
        if tick is not None:
            tick(waited)
        time.sleep(0.5)


def stop(server: Server) -> None:
    server.process.terminate()
    try:
        server.process.wait(30)
    except subprocess.TimeoutExpired:
        server.process.kill()


def start_pair(
    model: Path, logs: Path, *arguments: str, slots: int = 8, **environment: str
) -> list[Server]:
    """Starts `vllm serve` with so many slots, and stock's beside it."""
    logs.mkdir(exist_ok=True)
    added = {"slots": ("--moe-gpu-prefetch", str(slots)), "stock": ()}
    return [
        start(model, logs / f"{name}.log", *arguments, *more, **environment)
        for name, more in added.items()
    ]


@contextmanager
def all_serving(servers: list[Server]) -> Iterator[list[Server]]:
    """Waits until all of them answer; they are stopped at the end."""
    try:
        for server in servers:
            wait(server)
        yield servers
    finally:
        for server in servers:
            stop(server)


@contextmanager
def serving(
    model: Path,
    log: Path,
    *arguments: str,
    command: Sequence[str] = (),
    **environment: str,
) -> Iterator[Server]:
    """`start` and `wait`; the server is stopped at the end."""
    server = start(model, log, *arguments, command=command, **environment)
    with all_serving([server]):
        yield server
