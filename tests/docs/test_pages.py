# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Every link of the README and the pages to a file of the repository leads somewhere,
the index leads to every page, and pages that list things of the code list all of
them."""

import re
from dataclasses import fields

import pytest

from tests.docs.commands import PAGES
from tests.support import ROOT
from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchConfig
from vllm.model_executor.layers.fused_moe.expert_slots.counters import SIZES, TOTALS
from vllm.plugins.moe_gpu_prefetch import metrics

LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)")
LINKS = [
    (page, target, anchor)
    for page in PAGES
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8"))
]


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize(
    "page, target, anchor", LINKS, ids=lambda part: getattr(part, "name", part)
)
def test_the_link_leads_somewhere(page, target, anchor):
    """To a file that is there, and to a heading of it."""
    goal = (page.parent / target).resolve() if target else page
    assert goal.exists(), f"{page.relative_to(ROOT)} links {target}"
    if anchor:
        assert anchor in anchors(goal.read_text(encoding="utf-8")), goal


def test_the_index_has_every_page():
    docs = ROOT / "docs"
    index = (docs / "index.md").read_text(encoding="utf-8")
    linked = {target for target, _ in LINK.findall(index)}
    assert {page.name for page in docs.glob("*.md")} - {"index.md"} <= linked


def test_the_tour_names_files_and_functions_that_are_there():
    """And every room and module has its line."""
    tour = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
    feature = ROOT / "vllm/model_executor/layers/fused_moe/expert_slots"
    wiring = ROOT / "vllm/plugins/moe_gpu_prefetch"
    named = {feature / "__init__.py"}
    for path, function in re.findall(r"`([\w/]+(?:/|\.py))(?:: (\w+))?`", tour):
        short = wiring / path[2:] if path.startswith("P/") else feature / path
        file = short if short.exists() else ROOT / path
        assert file.exists(), path
        assert not function or f"def {function}(" in file.read_text(), path
        named |= {file, *file.parents}
    for place in (feature, wiring):
        for path in place.iterdir():
            if path.suffix == ".py" or (path / "__init__.py").exists():
                assert path in named, path


def test_every_metric_is_explained():
    """With the words of its help text."""
    page = (ROOT / "docs" / "observability.md").read_text(encoding="utf-8")
    texts = {f"{name}_total": text for name, text in TOTALS.items()} | SIZES
    texts |= {"link_bytes_per_second": metrics.LINK}
    for name, text in texts.items():
        assert f"| `vllm:moe_prefetch_{name}` | {text[0].lower()}{text[1:]} |" in page


def test_every_option_has_its_row():
    """In docs/flags.md."""
    page = (ROOT / "docs" / "flags.md").read_text(encoding="utf-8")
    options = {f".{field.name} " for field in fields(MoEPrefetchConfig)} - {".slots "}
    rows = set(re.findall(r"^\| `--moe-gpu-prefetch-config(\.\w+ )", page, re.M))
    assert rows == options
