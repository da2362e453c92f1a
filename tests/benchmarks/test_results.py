# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A result stands beside what it was measured on, and is not mixed with another's."""

import json
import subprocess

import pytest
from rich.table import Table

from benchmarks import results

HERE = {"date": "2030-01-02", "device": "NVIDIA RTX 4090", "commit": "abc"}


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "environment", lambda: HERE)
    return results.folder(tmp_path)


def test_a_folder_for_each_environment(place, tmp_path, monkeypatch):
    assert place.name == "2030-01-02-nvidia-rtx-4090"
    assert results.folder(tmp_path) == place
    changed = {**HERE, "commit": "abd"}
    monkeypatch.setattr(results, "environment", lambda: changed)
    other = results.folder(tmp_path)
    assert other.name == "2030-01-02-nvidia-rtx-4090-2" == results.folder(tmp_path).name
    assert json.loads((other / "environment.json").read_text()) == changed


def test_steps_stand_side_by_side(place):
    """A step that is measured again replaces itself and no other."""
    results.save(place, "micro", [{"what": "plan", "µs": 3.14159}], "first")
    results.save(place, "exact", [{"N": 8}, {"equal": True}], "second", "a note")
    text = results.save(place, "micro", [{"what": "load"}], "third", raw=[1, 2])
    assert "load" in text and "plan" not in text
    readme = (place / "README.md").read_text()
    assert "| commit | abc |" in readme and "    third" in readme
    assert "    first" not in readme and "a note" in readme
    assert "| 8 |  |\n|  | True |" in readme
    summary = json.loads((place / "summary.json").read_text())
    assert summary["micro"]["rows"] == [{"what": "load"}] and "exact" in summary
    assert json.loads((place / "raw" / "micro.json").read_text()) == [1, 2]


def test_printed_tables_are_kept(place, monkeypatch):
    monkeypatch.setattr(results, "folder", lambda: place)
    tables = [Table("", "stock", title="batch of 1"), Table("policy")]
    tables[0].add_row("tokens/s", "7")
    results.save_tables("overhead", tables)
    summary = json.loads((place / "summary.json").read_text())
    assert summary["overhead-1"]["rows"] == [{"": "tokens/s", "stock": "7"}]
    assert summary["overhead-1"]["note"] == "batch of 1"
    assert summary["overhead-2"]["rows"] == []


def test_results_are_no_change_of_the_tree(tmp_path, monkeypatch):
    """Else a second run would begin anew, with another commit than the first."""
    kept = tmp_path / "benchmarks" / "results"
    kept.mkdir(parents=True)
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "RESULTS", kept)
    monkeypatch.setenv("RESULTS_COMMIT", "of a copy")
    assert results.environment.__wrapped__()["commit"] == "of a copy"
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    for command in (["init"], ["commit", "--allow-empty", "-m", "first"]):
        subprocess.run(["git", *who, *command, "-q"], cwd=tmp_path, check=True)
    commit = results.environment.__wrapped__()["commit"]
    (kept / "measured").write_text("7")
    assert results.environment.__wrapped__()["commit"] == commit != "of a copy"
    (tmp_path / "changed").write_text("7")
    assert results.environment.__wrapped__()["commit"] == f"{commit} with changes"


def test_this_machine_is_described():
    here = results.environment()
    assert all(here.values()), here
    assert {"date", "commit", "device", "driver", "link", "vllm"} <= here.keys()


def test_committed_results_are_complete():
    for place in results.RESULTS.iterdir():
        here = json.loads((place / "environment.json").read_text())
        assert here.keys() == results.environment().keys(), place
        steps = json.loads((place / "summary.json").read_text())
        readme = (place / "README.md").read_text()
        assert steps and all(f"## {step}" in readme for step in steps)
        assert all((place / "raw" / f"{step}.json").exists() for step in steps)
