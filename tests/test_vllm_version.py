# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The vLLM that runs is the one that TEST_VLLM asks for, here and in the processes that
tests start; and the versions that are tested are those that the package declares."""

import re
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from vllm.distributed import parallel_state

import vllm
from tests.conftest import ASKED_VLLM
from tests.support import ROOT
from tools import vllm_versions
from tools.vllm_versions import RELEASES, VERSIONS, release
from vllm.model_executor.layers.fused_moe.expert_slots.capacity.ranks import _GROUPS
from vllm.plugins.moe_gpu_prefetch.stock.seams import SUPPORTED

PRINT = "import vllm; print(vllm.__version__.partition('+')[0])"


def test_this_process_runs_the_version_that_was_asked_for():
    """Nothing imported another one before."""
    assert vllm.__version__.partition("+")[0] == ASKED_VLLM.partition("+")[0]


def test_a_process_started_here_runs_the_same_version():
    """The commands that tests start find it too, by PYTHONPATH."""
    result = subprocess.run(
        [sys.executable, "-c", PRINT], capture_output=True, text=True, cwd=ROOT
    )
    assert result.stdout.strip() == vllm.__version__.partition("+")[0], result.stderr


def test_a_vllm_outside_the_environment_is_found(monkeypatch, tmp_path):
    """As in a tree that PYTHONPATH names."""
    monkeypatch.setattr(vllm_versions, "PACKAGES", tmp_path)
    assert vllm_versions.installed().partition("+")[0] in VERSIONS


def test_the_versions_are_those_that_we_declare():
    """One of each minor version in the range, and the range holds no other."""
    assert {version.rpartition(".")[0] for version in VERSIONS} == {"0.32", "0.33"}
    assert all(version in SUPPORTED for version in VERSIONS)
    assert "0.31.9" not in SUPPORTED and "0.34.0" not in SUPPORTED


def test_the_ranges_of_the_package_and_of_make_are_the_same():
    """And `make test` runs on the last of the versions, too."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = map(Requirement, project["dependencies"])
    [declared] = (each for each in needed if each.name == "vllm")
    assert declared.specifier == SUPPORTED
    makefile = (ROOT / "Makefile").read_text()
    [installed] = re.findall(r'"(vllm[<>].*?)"', makefile)
    assert Requirement(installed).specifier == SUPPORTED
    assert re.findall(r"(?m)^NEXT_VLLM := (.+)$", makefile) == [VERSIONS[-1]]


@pytest.mark.parametrize("name", _GROUPS)
def test_vllm_has_the_group(name):
    """A plan for several ranks puts its own into it."""
    assert hasattr(parallel_state, name)


def test_a_release_that_cannot_be_fetched_ends_with_what_pip_said():
    """In one line, with the version; nothing is left below the environment."""
    with pytest.raises(LookupError) as error:
        release("0.0.0.1")
    assert str(error.value) == (
        "vLLM 0.0.0.1 could not be fetched: No matching distribution found for "
        f"vllm==0.0.0.1. Give a published version, like {VERSIONS[-1]}."
    )
    assert not list(RELEASES.glob("0.0.0.1*"))
