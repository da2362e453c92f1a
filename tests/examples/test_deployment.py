# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The deployment examples say what is so: their flags are vLLM's and ours, their memory
is what the plan asks for, and the image is built from what they name."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections import defaultdict
from pathlib import Path, PurePosixPath

import pytest
import yaml
from packaging.requirements import Requirement

from tests.support import ROOT
from tests.support.command_line import moe_prefetch
from tools.sizing_table import write
from vllm.model_executor.layers.fused_moe.expert_slots.capacity.host_memory import (
    HostMemory,
)
from vllm.model_executor.layers.fused_moe.expert_slots.sizes import GIB, gib

EXAMPLES = ROOT / "examples"
GPU = "4090"
"""The smallest GPU of the size that the examples name, 24 GB."""

PROCESSES = 8 * GIB
"""What vLLM's processes take beside the experts, generously."""

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMPOSE = yaml.safe_load((EXAMPLES / "compose.yaml").read_text())
KUBERNETES = {
    part["kind"]: part
    for part in yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text())
}
SERVICE = COMPOSE["services"]["vllm"]
POD = KUBERNETES["Deployment"]["spec"]["template"]
(CONTAINER,) = POD["spec"]["containers"]
PAGES = (
    *(EXAMPLES / name for name in ("compose.yaml", "kubernetes.yaml")),
    ROOT / "docs" / "deployment.md",
)


def option(name: str) -> str:
    """What the examples give for an option."""
    (value,) = (
        argument.partition("=")[2]
        for argument in SERVICE["command"]
        if argument.startswith(f"{name}=")
    )
    return value


def size(text: str) -> int:
    """Bytes of a size as Compose (`80g`) or Kubernetes (`80Gi`) writes it."""
    found = re.fullmatch(r"(\d+)(?:g|Gi)", text)
    assert found, text
    return int(found[1]) * GIB


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """What `vllm-moe-prefetch plan` says of the examples' own command."""
    model, *flags = SERVICE["command"]
    config = write(PurePosixPath(model).name, tmp_path_factory.mktemp("model"))
    answer = moe_prefetch("plan", str(config), *flags, "--gpu", GPU, "--json")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    (row,) = json.loads(answer.stdout)
    return row


def test_both_serve_the_same():
    assert CONTAINER["args"] == SERVICE["command"]
    assert CONTAINER["image"] == SERVICE["image"]
    environment = {entry["name"]: entry["value"] for entry in CONTAINER["env"]}
    assert environment == SERVICE["environment"]


def test_it_fits_the_gpu_and_its_batches_fit_the_slots(plan):
    """The plan's parser is that of `vllm serve`, so that a flag that it does not know
    ends it. A full batch outgrows neither the KV cache nor the slots."""
    sequences = int(option("--max-num-seqs"))
    assert plan["fits"], plan["reason"]
    assert plan["slots"] == int(option("--moe-gpu-prefetch"))
    assert plan["kv_sequences"] >= sequences
    assert plan["resident_sequences"] >= sequences


@pytest.mark.parametrize(
    "limit",
    [
        SERVICE["deploy"]["resources"]["limits"]["memory"],
        CONTAINER["resources"]["requests"]["memory"],
        CONTAINER["resources"]["limits"]["memory"],
    ],
    ids=["compose", "kubernetes request", "kubernetes limit"],
)
def test_the_container_has_memory_for_the_experts(plan, limit):
    total = size(limit)
    reserve = HostMemory(total, total).reserve()
    assert total >= plan["host_bytes"] + reserve + PROCESSES


def test_the_shared_store_has_room_in_shared_memory(plan):
    """Docker has the host's shared memory, Kubernetes a volume that is large enough."""
    store = PurePosixPath(option("--moe-gpu-prefetch-config.shared_store"))
    assert store.is_relative_to("/dev/shm")
    assert SERVICE["ipc"] == "host"
    mounts = {mount["name"]: mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    (volume,) = (v for v in POD["spec"]["volumes"] if mounts[v["name"]] == "/dev/shm")
    assert volume["emptyDir"]["medium"] == "Memory"
    assert size(volume["emptyDir"]["sizeLimit"]) >= plan["host_bytes"]


def test_directories_that_stay_lie_below_a_volume():
    """Below, not at it: a volume's own directory may be open to others, and such a
    directory is refused."""
    docker = {volume.partition(":")[2] for volume in SERVICE["volumes"]}
    kubernetes = {mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    kept = [
        option("--moe-gpu-prefetch-config.warm_start"),
        SERVICE["environment"]["HF_HOME"],
    ]
    for path in map(PurePosixPath, kept):
        for mounts in (docker, kubernetes):
            assert any(str(parent) in mounts for parent in path.parents), path


def test_the_end_waits_for_the_engine():
    shutdown = int(option("--shutdown-timeout"))
    assert int(SERVICE["stop_grace_period"].removesuffix("s")) > shutdown
    assert POD["spec"]["terminationGracePeriodSeconds"] > shutdown


def test_each_has_one_gpu():
    (device,) = SERVICE["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert CONTAINER["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_the_second_server_starts_when_the_first_one_answers():
    """A start while the store is built would need room for another copy."""
    waits = COMPOSE["services"]["second"]["depends_on"]
    assert waits == {"vllm": {"condition": "service_healthy"}}
    assert any("/health" in part for part in SERVICE["healthcheck"]["test"])


def test_kubernetes_names_what_is_there():
    """Labels select the pod, volumes are mounted, the claim and the port exist."""
    deployment, service = KUBERNETES["Deployment"]["spec"], KUBERNETES["Service"]
    labels = POD["metadata"]["labels"]
    assert deployment["selector"]["matchLabels"] == labels
    assert service["spec"]["selector"] == labels
    volumes = {volume["name"]: volume for volume in POD["spec"]["volumes"]}
    assert {mount["name"] for mount in CONTAINER["volumeMounts"]} == set(volumes)
    claim = volumes["models"]["persistentVolumeClaim"]["claimName"]
    assert claim == KUBERNETES["PersistentVolumeClaim"]["metadata"]["name"]
    ports = {port["name"] for port in CONTAINER["ports"]}
    probes = [
        CONTAINER[f"{kind}Probe"]["httpGet"]
        for kind in ("startup", "liveness", "readiness")
    ]
    assert all(probe == {"path": "/health", "port": "http"} for probe in probes)
    assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_experts_size_stands_in_the_text(plan, page):
    assert f"{gib(plan['host_bytes'])} of experts" in page.read_text()


@pytest.fixture(scope="module")
def dockerfile() -> dict[str, list[list[str]]]:
    """The arguments of every instruction, by its name."""
    text = (EXAMPLES / "Dockerfile").read_text().replace("\\\n", " ")
    instructions = defaultdict(list)
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            name, _, rest = line.partition(" ")
            arguments = json.loads(rest) if rest.startswith("[") else shlex.split(rest)
            instructions[name].append(arguments)
    return instructions


def test_the_image_is_of_a_supported_vllm(dockerfile):
    assert set(dockerfile) == {"FROM", "COPY", "RUN", "ENTRYPOINT"}
    ((image,),) = dockerfile["FROM"]
    name, version = image.split(":v")
    requirements = map(Requirement, PROJECT["dependencies"])
    (vllm,) = (each for each in requirements if each.name == "vllm")
    assert name == "vllm/vllm-openai"
    assert vllm.specifier.contains(version)
    assert dockerfile["ENTRYPOINT"] == [["vllm", "serve"]]


def test_the_image_has_this_projects_version():
    assert SERVICE["image"] == f"vllm-expert-slots:{PROJECT['version']}"
    assert f"-t {SERVICE['image']} ." in (EXAMPLES / "Dockerfile").read_text()
    build = SERVICE["build"]
    assert (EXAMPLES / build["context"]).resolve() == ROOT
    assert (ROOT / build["dockerfile"]) == EXAMPLES / "Dockerfile"


def test_docker_is_sent_what_the_image_copies(dockerfile):
    """And nothing else: the environment alone has gigabytes."""
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    sent = {line[1:] for line in ignored if line.startswith("!")}
    assert sent == {path for *paths, _ in dockerfile["COPY"] for path in paths}


def test_what_the_image_copies_installs_as_the_whole_package(dockerfile, tmp_path):
    """A wheel is built of the files that the Dockerfile copies, and has every module of
    ours, nothing of stock's, and the plugin's entry points."""
    source = tmp_path / "src"
    source.mkdir()
    for *paths, target in dockerfile["COPY"]:
        for path in paths:
            if (ROOT / path).is_dir():
                place = source / PurePosixPath(target).relative_to("/src")
                shutil.copytree(ROOT / path, place)
            else:
                shutil.copy(ROOT / path, source)
    assert ["uv", "pip", "install", "--system", "/src"] in dockerfile["RUN"]
    build = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps")
    subprocess.run(
        [*build, "--no-build-isolation", "-w", str(tmp_path), str(source)],
        check=True,
        timeout=300,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (points,) = (n for n in archive.namelist() if n.endswith("entry_points.txt"))
        entry_points = archive.read(points).decode()
    modules = {str(path.relative_to(ROOT)) for path in Path(ROOT, "vllm").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    assert "[vllm.general_plugins]" in entry_points
    assert "vllm-moe-prefetch" in entry_points
