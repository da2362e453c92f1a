# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What `make compat` ends with. The parts that it runs are tests of their own."""

import pytest

from tools import compat
from tools.vllm_versions import VERSIONS


@pytest.fixture
def ran(monkeypatch, tmp_path):
    """The parts that ran, on a release that requires two packages; a name in `failing`
    fails."""
    information = tmp_path / "vllm-0.34.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(
        "Requires-Dist: torch\nRequires-Dist: not-there>=2\n"
        'Requires-Dist: nor-this; extra == "audio"\n'
    )
    parts: list[str] = []
    failing: set[str] = set()

    def part(name: str) -> bool:
        parts.append(name)
        return name not in failing

    monkeypatch.setattr(compat, "release", lambda asked: tmp_path)
    monkeypatch.setattr(compat, "check", lambda asked: part("types"))
    monkeypatch.setattr(
        compat,
        "passes",
        lambda asked, *tests: part("seams" if tests == compat.SEAMS else "tests"),
    )
    return parts, failing


def test_a_supported_release_runs_everything(ran, capsys):
    """And says what it lacks and that it works."""
    assert compat.main([VERSIONS[-1]]) is None
    assert ran[0] == ["types", "seams", "tests"]
    output = capsys.readouterr().out
    assert "lacks: not-there\n" in output and "works" in output


def test_what_differs_is_named_and_the_rest_still_runs(ran):
    ran[1].update({"types", "tests"})
    ended = compat.main([VERSIONS[-1]])
    assert ended == f"vLLM {VERSIONS[-1]} differs in: types, tests. See above."
    assert ran[0] == ["types", "seams", "tests"]


def test_a_release_outside_the_range_is_not_said_to_work(ran):
    """Slots refuse it, so their tests would all fail."""
    ended = compat.main(["0.34.0"])
    assert ran[0] == ["types", "seams"]
    assert ended is not None and "did not run" in ended and "<0.34" in ended


@pytest.mark.parametrize("arguments", [[], [""], ["0.33.0", "0.34.0"]])
def test_one_version_is_needed(arguments):
    assert compat.main(arguments) == "Give one version: make compat VERSION=0.33.0"


def test_an_unknown_release_ends_in_one_line(monkeypatch):
    def release(asked: str) -> None:
        raise LookupError(f"vLLM {asked} could not be fetched.")

    monkeypatch.setattr(compat, "release", release)
    assert compat.main(["9.9"]) == "vLLM 9.9 could not be fetched."
