# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""docs/quantisation.md says what the code serves and the tests show, and its bytes of
an expert are those of vLLM's own processing."""

import re

import pytest
import torch
from vllm.model_executor.layers.fused_moe.experts.marlin_moe import MarlinExperts

from tests.cuda import test_quantised_on_gpu_path as gpu_path
from tests.quantised import test_engine, test_rows
from tests.support import ROOT, moe_formats, processed_layers
from tests.support.named_tests import is_there
from vllm.model_executor.layers.fused_moe.expert_slots.capacity.processed import (
    processed,
)
from vllm.model_executor.layers.fused_moe.expert_slots.cpu.experts import (
    CPU_EXPERTS_CLASSES,
)
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.kernels import SERVED
from vllm.model_executor.layers.fused_moe.expert_slots.refusals.formats import (
    FORMATS,
    KERNELS,
)

PAGE = (ROOT / "docs" / "quantisation.md").read_text(encoding="utf-8")
HIDDEN, WIDTH = 2048, 768
"""Of Qwen3-30B-A3B."""

NOTHING = "\N{EN DASH}"
"""There is nothing to show."""

SHOWN = {
    # CPU engine, interpreter, rows, GPU's code: as these tests name the format.
    "FP8, blocks of 128 x 128": ("fp8-block", "fp8 block", None, "fp8-block"),
    "FP8, channels": (None, "fp8 channel", None, "fp8-channel"),
    "FP8, static activation scales": (None, "fp8 static", None, "fp8-static"),
    "FP8, dynamic scale of a tensor": (None, "fp8 dynamic", None, None),
    "FP8, blocks, before 8.9": (None, None, "fp8-block", "fp8-block by Marlin"),
    "FP8, channels, before 8.9": (None, None, "fp8-ct-channel", None),
    "FP8, static activation scales, before 8.9": (
        *(None, None, "fp8-static", "fp8-static by Marlin"),
    ),
    "INT8 W8A8, channels": ("int8", "int8 channel", None, "int8"),
    "INT8 weights, groups": (None, None, "int8-ct", None),
    "INT4 compressed-tensors": ("int4-ct", None, "int4-ct", "int4-ct"),
    "INT4 compressed-tensors, zero points": (
        *(None, None, "int4-ct-asym", "int4-ct-asym"),
    ),
    "INT4 GPTQ": ("gptq", None, "gptq", "gptq"),
    "INT4 AWQ": ("awq", None, "awq", "awq"),
    "INT4, `--moe-backend triton`": (None, "int4 groups", None, "int4-ct by Triton"),
    "INT4, zero points, `--moe-backend triton`": (None, "int4 zero points", None, None),
    "MXFP4 of gpt-oss, with biases": ("mxfp4", None, "mxfp4", "mxfp4"),
    "MXFP4 of compressed-tensors, below 10.0 and on 12.0": (
        *(None, None, "mxfp4-ct", None),
    ),
    "NVFP4": (None, None, "nvfp4", None),
    "NVFP4, `--moe-backend emulation`": (None, "nvfp4 emulation", None, None),
    "MXFP8": (None, None, "mxfp8", None),
}
"""The formats of the table, but for the unquantised one."""

TESTED = (
    set(test_engine.PROCESSED),
    set(moe_formats.FORMATS),
    set(test_rows.FORMATS),
    set(gpu_path.WAYS),
)
NO_ROW = {"int8 weight-only", "int8 groups", "gptq-bias"}
"""Tested formats that differ from one of the table in a part only."""


def rows() -> dict[str, list[str]]:
    """Of the table "What is shown": format -> its cells."""
    [table] = re.findall(
        r"(?m)^\| format \| kernel from.*\n\|[-|]+\n((?:\|.*\n)+)", PAGE
    )
    cells = [line.strip("| ").split(" | ") for line in table.splitlines()]
    return {row[0]: row[1:] for row in cells}


def value(formula: str, hidden: int, width: int) -> float:
    assert re.fullmatch(r"`[WO\d*/+ ]+`", formula)
    names = {"W": 3 * hidden * width, "O": 2 * width + hidden}
    return eval(formula.strip("`"), {"__builtins__": {}}, names)


def test_the_kernels_are_those_that_slots_serve():
    """On both platforms, and nothing else is named as one."""
    named = set(re.findall(r"`(\w+Experts\w*)`", PAGE))
    refused = {name for name in named if any(part in name for part in KERNELS)}
    assert named - refused == set(SERVED) | CPU_EXPERTS_CLASSES
    assert {row[0].strip("`") for row in rows().values()} == set(SERVED)


def test_each_cell_is_shown_or_marked():
    """By a test that has the format, or the cell does not say so. Every tested format
    has a row."""
    table = rows()
    unquantised = table.pop("unquantised, 16-bit")[1:6]
    assert unquantised == ["yes", "yes", NOTHING, "yes", "not yet"]
    assert list(table) == list(SHOWN)
    for name, (_, *cells, gpu, _, _) in table.items():
        assert len(cells) == len(TESTED) and gpu == "not yet"
        for cell, by, tested in zip(cells, SHOWN[name], TESTED, strict=True):
            assert cell == "yes" if by else cell in ("no", NOTHING), (name, by)
            assert by is None or by in tested, (name, by)
    for place, tested in enumerate(TESTED):
        assert tested - NO_ROW <= {names[place] for names in SHOWN.values()}


def test_what_the_page_names_is_there():
    """Tests, and what is refused by name."""
    named = re.findall(r"`(\w+/test_\w+\.py::\w+)`", PAGE)
    assert len(named) > 8 and all(map(is_there, named))
    refused = PAGE.partition("## What is refused")[2].lower()
    for name in (*FORMATS, *KERNELS):
        assert name.lower() in refused.replace("-", ""), name


@pytest.mark.parametrize("name", rows())
def test_the_bytes_follow_their_formula(name):
    """At the shape of the page, and at that of the engines on the GPU's code."""
    *_, formula, example = rows()[name]
    assert f"{value(formula, HIDDEN, WIDTH):,.0f}" == example
    tested = SHOWN.get(name, [None])[-1]
    if tested is not None:
        way = gpu_path.WAYS[tested]
        assert rows()[name][0] == f"`{way.kernel}`"
        shape = gpu_path.HIDDEN, gpu_path.WIDTH
        if tested == "mxfp4":
            shape = 256, shape[1]  # stock pads gpt-oss
        assert value(formula, *shape) == way.bytes_per_expert


OF_MARLIN = [name for name, tests in SHOWN.items() if tests[2]]


@pytest.mark.parametrize("name", OF_MARLIN)
def test_the_bytes_are_those_of_vllms_processing(monkeypatch, name):
    """For Marlin, of which vLLM makes other tensors than the checkpoint has."""
    form = test_rows.FORMATS[SHOWN[name][2]]
    monkeypatch.setattr(MarlinExperts, "_supports_current_device", lambda: True)
    monkeypatch.setattr(processed_layers, "HIDDEN", HIDDEN)
    monkeypatch.setattr(processed_layers, "WIDTH", WIDTH)
    with processed_layers.building(form):
        with torch.device("meta"):
            layer = processed_layers.built(form, 4)
        if form.bias:
            layer._loaded_expert_biases = {"w13_bias", "w2_bias"}
        made = processed(layer, {}).rows
    formula = rows()[name][-2]
    assert sum(size for _, size in made) == value(formula, HIDDEN, WIDTH)
