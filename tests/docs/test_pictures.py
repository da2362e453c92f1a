# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The pictures of the documentation, and the tables beside them, show what the code
gives now."""

import re
from xml.etree import ElementTree

import pytest

from tests.support import ROOT
from tools.pictures import DRAWN, EXPERTS, PICTURES, plans

MEASURED = {"observability.png"}
"""Drawn of a running server (`tools/draw_panels.py`): no two runs draw the same."""


@pytest.mark.parametrize("name", DRAWN)
def test_drawing_again_gives_the_same_bytes(name):
    """Otherwise `python -m tools.pictures` draws them anew; look at what has
    changed."""
    drawn = DRAWN[name]()
    ElementTree.fromstring(drawn)
    assert drawn == (PICTURES / name).read_text(encoding="utf-8")


def test_each_picture_is_shown():
    """By the README or a page, and no page shows one that is not there."""
    pages = [ROOT / "README.md", *PICTURES.parent.glob("*.md")]
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    for name in (*DRAWN, *MEASURED):
        assert f"pictures/{name}" in text
    for path in (PICTURES / "tune").iterdir():
        assert f"pictures/tune/{path.name}" in text
    assert {path.name for path in PICTURES.iterdir()} == {*DRAWN, *MEASURED, "tune"}


def test_the_tables_have_the_figures_of_the_memory_picture():
    """The README's, and the answer of `plan` in docs/sizing.md."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    sizing = (PICTURES.parent / "sizing.md").read_text(encoding="utf-8")
    for plan in plans():
        gpu, staging, kv, host = (
            f"{plan[name] / (1 << 30):.2f}"
            for name in ("gpu_bytes", "staging_bytes", "kv_cache_bytes", "host_bytes")
        )
        if plan["slots"] == EXPERTS:
            assert f"| {gpu} | does not fit |" in readme
        elif f"\n| {plan['slots']} of {EXPERTS}" in readme:
            assert f"| {gpu} | {kv} | {host} |" in readme
            columns = [plan["slots"], "yes", gpu, staging, kv]
            columns += [f"{plan['kv_sequences']:.1f}", plan["resident_sequences"], host]
            row = r" +".join(re.escape(str(column)) for column in columns)
            assert re.search(rf"^ +{row}$", sizing, re.M), row
    assert len(re.findall(rf"^\| \d+ of {EXPERTS}", readme, re.M)) == 4


def test_the_readmes_row_of_auto():
    """The number of slots that `auto` takes with the README's own command."""
    [plan] = plans("auto", "--max-num-seqs", "4")
    figures = " | ".join(
        f"{plan[name] / (1 << 30):.2f}"
        for name in ("gpu_bytes", "kv_cache_bytes", "host_bytes")
    )
    words = "`auto` with `--max-num-seqs 4`, as below"
    row = f"| {words}: {plan['slots']} of {EXPERTS} | {figures} |"
    assert row in (ROOT / "README.md").read_text(encoding="utf-8")
