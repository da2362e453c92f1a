# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The files that GitHub and pre-commit read are ones that they accept."""

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.support import ROOT

GITHUB = ROOT / ".github"
FORMS = [p for p in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if p.stem != "config"]
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text()

KEYS = {"name", "description", "title", "labels", "assignees", "type", "projects"}
NEEDED = {
    "markdown": {"value"},
    "input": {"label"},
    "textarea": {"label"},
    "dropdown": {"label", "options"},
    "checkboxes": {"label", "options"},
}
"""The attributes that GitHub asks of each kind of field."""


LONGEST_MODULE = 350
"""Lines."""


def read(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


def modules() -> list[Path]:
    """The Python files that git holds, and the new ones that it does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    found = {ROOT / name for name in listed.stdout.splitlines()}
    there = sorted(path for path in found if path.exists())
    assert there
    return there


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_an_issue_form_has_what_github_requires(path):
    form = read(path)
    assert set(form) <= {*KEYS, "body"}
    for key in ("name", "description"):
        assert isinstance(form[key], str) and form[key].strip()
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert fields
    for field in form["body"]:
        assert set(field) <= {"type", "id", "attributes", "validations"}
        attributes = field["attributes"]
        assert NEEDED[field["type"]] <= set(attributes)
        required = field.get("validations", {"required": False})
        assert set(required) == {"required"} and isinstance(required["required"], bool)
        options = attributes.get("options", [])
        assert all(isinstance(option, str) and option.strip() for option in options)
        assert len(set(options)) == len(options) and "None" not in options
    ids = [field["id"] for field in fields]
    labels = [field["attributes"]["label"] for field in fields]
    assert len(set(ids)) == len(ids) and len(set(labels)) == len(labels)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+", name) for name in ids)


def test_a_hardware_report_asks_for_what_makes_it_comparable():
    form = read(GITHUB / "ISSUE_TEMPLATE" / "hardware-report.yml")
    required = {
        field["id"]
        for field in form["body"]
        if field.get("validations", {}).get("required")
    }
    assert required >= {
        *("gpu", "link", "memory", "versions", "model", "flags", "workload"),
        *("hit-rate", "speed", "stock-speed"),
    }


def test_the_chooser_has_what_github_requires():
    config = read(GITHUB / "ISSUE_TEMPLATE" / "config.yml")
    assert isinstance(config["blank_issues_enabled"], bool)
    for link in config["contact_links"]:
        assert set(link) == {"name", "url", "about"}
        assert link["url"].startswith("https://")


def test_both_workflows_are_there():
    assert {path.stem for path in WORKFLOWS} == {"ci", "vllm-compat"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_has_what_github_requires(path):
    """Jobs, runners and steps; and every `make` target that it calls."""
    workflow = read(path)
    assert workflow[True]  # YAML 1.1 reads the key `on` as a truth value
    for job in workflow["jobs"].values():
        assert job["runs-on"]
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step), step
            for target in re.findall(r"\bmake ([a-z][\w-]*)", step.get("run", "")):
                assert re.search(rf"^{target}\b.*:", MAKEFILE, re.M), target


def hooks() -> dict[str, dict]:
    config = read(ROOT / ".pre-commit-config.yaml")
    (repository,) = config["repos"]
    assert repository["repo"] == "local"
    return {hook["id"]: hook for hook in repository["hooks"]}


def test_hooks_have_what_pre_commit_requires():
    for hook in hooks().values():
        assert {"id", "name", "entry", "language"} <= set(hook)


def test_hooks_run_what_lint_runs():
    """The same tools, of the same environment."""
    check = re.search(r"^format-check:.*\n((?:\t.*\n)+)", MAKEFILE, re.M)[1]
    run = [hook for hook in hooks().values() if hook["language"] == "system"]
    assert run
    for hook in run:
        tool, command, *_ = shlex.split(hook["entry"])
        assert tool.startswith(".venv/bin/")
        assert f"$(BIN)/{Path(tool).name} {command}" in check


def test_hooks_that_look_for_a_line_find_it():
    """Every module has the licence line, and a signed commit the sign-off."""
    spdx, sign_off = hooks()["spdx"], hooks()["sign-off"]
    for hook in (spdx, sign_off):
        assert hook["language"] == "pygrep" and hook["args"] == ["--negate"]
    for path in modules():
        assert re.search(spdx["entry"], path.read_text(), re.M), path
    assert re.search(sign_off["entry"], "Signed-off-by: A Name <a.name@example.org>")
    assert not re.search(sign_off["entry"], "Signed-off-by: A Name")


def test_the_changelog_has_this_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == version


def test_no_module_is_long():
    """Code, tests, benchmarks and tools."""
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in modules()
    }
    long = {name: lines for name, lines in lengths.items() if lines > LONGEST_MODULE}
    assert not long, f"over {LONGEST_MODULE} lines, so split: {long}"
