# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The tables of docs/sizing.md have the models and GPUs that `python -m
tools.sizing_table` prints, and cells of its form. Two figures are computed again in
capacity/test_plan_elsewhere.py."""

import re

import pytest

from tests.support import ROOT
from tools.sizing_models import LARGE_MODELS, MODELS, QUANTISED_MODELS
from tools.sizing_table import GPUS, LARGE_GPUS, SMALL_GPUS

PAGE = (ROOT / "docs" / "sizing.md").read_text(encoding="utf-8")
TABLES = re.findall(r"(?m)^\| model \|.*\n\|[-|]+\n(?:\|.*\n)+", PAGE)
ROOM = r"\d+\.\d \+ \d+\.\d"


@pytest.mark.parametrize(
    ("table", "models", "gpus", "form"),
    [
        (0, MODELS, GPUS, rf"\d+ of \d+; {ROOM}|does not fit"),
        (
            1,
            QUANTISED_MODELS,
            SMALL_GPUS,
            rf"\d+ of \d+; {ROOM}; \d+\.\d|fits whole; {ROOM}; none|"
            r"does not fit: .+",
        ),
        (2, LARGE_MODELS, LARGE_GPUS, rf"\d+ of \d+; {ROOM}; \d+\.\d|does not fit: .+"),
    ],
)
def test_the_table_is_the_one_that_is_printed(table, models, gpus, form):
    head, _, *rows = (
        line.strip("| ").split(" | ") for line in TABLES[table].splitlines()
    )
    assert head == ["model", *gpus]
    assert [row[0] for row in rows] == list(models)
    for _, *cells in rows:
        assert len(cells) == len(gpus)
        assert all(re.fullmatch(form, cell) for cell in cells), cells


def test_the_figures_of_the_readme_are_the_tables():
    """The smallest GPU in whose column a large model fits, and its experts' GiB."""
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    (said,) = re.findall(
        r"gpt-oss-120b fits a GPU of (\d+) GB, with (\d+) GiB of experts in host "
        r"memory, and DeepSeek-V3 in INT4 one of (\d+) GB, with (\d+)\.",
        readme,
    )
    found = []
    for table, model in ((1, "gpt-oss-120b, MXFP4"), (2, "DeepSeek-V3, INT4 (AWQ)")):
        head, _, *rows = (
            line.strip("| ").split(" | ") for line in TABLES[table].splitlines()
        )
        (cells,) = (cells for name, *cells in rows if name == model)
        gpu, cell = next(
            (gpu, cell)
            for gpu, cell in zip(head[1:], cells, strict=True)
            if not cell.startswith("does not fit")
        )
        gigabytes = {"RTX 3060": 12, "RTX A6000": 48}[gpu]
        found += [gigabytes, round(float(cell.rpartition("; ")[2]))]
    assert [int(number) for number in said] == found
