# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Every name of vLLM that we lean on is there, in the shape that we rely on."""

import subprocess
import sys

import pytest
from vllm.platforms import current_platform

import vllm
from tests.support import ROOT
from vllm.plugins.moe_gpu_prefetch.stock import seams
from vllm.plugins.moe_gpu_prefetch.stock.seam import relied_on
from vllm.plugins.moe_gpu_prefetch.stock.seams import (
    SUPPORTED,
    missing,
    unsupported_version,
)

SEAMS = [
    seam
    for seam in seams.SEAMS
    if seam.applies_to(vllm.__version__)
    and (not seam.on_cuda or current_platform.is_cuda())
]
IN_TREE = ROOT / "docs" / "in-tree.md"


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: seam.target)
def test_the_seam_is_there(seam):
    """The name resolves against the installed vLLM and takes the parameters that we
    use."""
    lack = missing(seam)
    assert lack is None, f"{lack}; it {seam.reason}"


@pytest.mark.parametrize(
    "seam", [s for s in SEAMS if s.in_tree], ids=lambda seam: seam.target
)
def test_the_in_tree_page_names_the_place(seam):
    """docs/in-tree.md says, for each place, what the feature would be as a patch on
    vLLM."""
    page = " ".join(IN_TREE.read_text().split())
    assert f"`{seam.target}`" in page and seam.in_tree in page


def test_wrapped_and_replaced_seams_are_the_ones_that_we_touch():
    """Registering the plugin changes the names marked so, and no other of the table."""
    script = (
        "from tests.plugin.test_seams import SEAMS\n"
        "from vllm.plugins.moe_gpu_prefetch import register\n"
        "from vllm.plugins.moe_gpu_prefetch.stock.seams import resolve\n"
        "stock = [resolve(s.target) for s in SEAMS]\n"
        "register()\n"
        "from vllm.model_executor.custom_op import op_registry_oot\n"
        "assert not op_registry_oot\n"
        "from vllm.plugins.moe_gpu_prefetch import registry\n"
        "from vllm.plugins.moe_gpu_prefetch.guard import guard_worker\n"
        "with registry.in_place(): pass  # as a worker of a slotted model does\n"
        "guard_worker()  # and on this platform\n"
        "import os, pathlib\n"
        "from vllm.plugins.moe_gpu_prefetch import log_line, metrics\n"
        "os.environ['PROMETHEUS_MULTIPROC_DIR'] = '.'  # of several API servers\n"
        "from tests.plugin.test_metrics import MODEL\n"
        "metrics.show(pathlib.Path('none'), MODEL)  # as each of them does\n"
        "log_line.follow(pathlib.Path('none'), 'engine')  # as one alone does\n"
        "for seam, before in zip(SEAMS, stock):\n"
        "    if seam.target.endswith('gpu_worker:Worker.compile_or_warm_up_model'): "
        "continue\n"
        "    changed = resolve(seam.target) != before\n"
        "    assert changed == (seam.kind == 'wrapped'), seam\n"
        "own = {name.removeprefix('Transformers') for name in op_registry_oot}\n"
        "own -= {'SubstitutedRoutedExperts'}  # of 0.33; refused when it is built\n"
        "assert own == {'MoERunner', 'RoutedExperts'}, op_registry_oot\n"
    )
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-2000:]


def test_the_installed_version_is_supported():
    """The range that the package declares holds the vLLM that the tests run on."""
    assert unsupported_version() is None
    assert "0.31.0" not in SUPPORTED and "0.34.0" not in SUPPORTED


@pytest.mark.parametrize(
    ("name", "lack"),
    [
        ("nothing", "cannot be used (EngineArgs has no nothing)"),
        ("create_engine_config", None),
        ("model", None),  # a field
    ],
)
def test_what_a_class_lacks_is_said(name, lack):
    """A method, a field, or neither."""
    target = f"vllm.engine.arg_utils:EngineArgs.{name}"
    assert missing(relied_on(target, "")) == (lack and f"{target} {lack}")
