# SPDX-License-Identifier: Apache-2.0
"""Every name of vLLM that we lean on is there, in the shape that we rely on."""

import importlib
import inspect
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

import vllm
from vllm.plugins.moe_gpu_prefetch import layers, seams
from vllm.plugins.moe_gpu_prefetch.seams import SUPPORTED, unsupported_version

SEAMS = [seam for seam in seams.SEAMS if seam.applies_to(vllm.__version__)]
IN_TREE = Path(__file__).resolve().parent.parent / "docs" / "in-tree.md"


def resolve(target):
    module, _, qualname = target.partition(":")
    value = importlib.import_module(module)
    for name in qualname.split("."):
        if is_dataclass(value) and name in {field.name for field in fields(value)}:
            return value
        if inspect.isclass(value) and not hasattr(value, name):
            assert f"self.{name}" in inspect.getsource(value), f"{target}: no {name}"
            return value
        value = getattr(value, name)
    return value


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: seam.target)
def test_the_seam_is_there(seam):
    """The name resolves against the installed vLLM and takes the parameters that we use."""
    value = resolve(seam.target)
    if seam.parameters:
        missing = set(seam.parameters) - set(inspect.signature(value).parameters)
        assert not missing, f"{seam.target} lost {missing}; we need it because it {seam.reason}"


@pytest.mark.parametrize("seam", [s for s in SEAMS if s.in_tree], ids=lambda seam: seam.target)
def test_the_in_tree_page_names_the_place(seam):
    """docs/in-tree.md says, for each place, what the feature would be as a patch on vLLM."""
    page = " ".join(IN_TREE.read_text().split())
    assert f"`{seam.target}`" in page and seam.in_tree in page


def test_wrapped_and_replaced_seams_are_the_ones_that_we_touch():
    """Registering the plugin changes the names marked so, and no other of the table."""
    script = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from test_seams import resolve, SEAMS\n"
        "from vllm.plugins.moe_gpu_prefetch import register\n"
        "stock = [resolve(s.target) for s in SEAMS]\n"
        "register()\n"
        "from vllm.plugins.moe_gpu_prefetch.loading import reset_after_warm_up\n"
        "reset_after_warm_up()  # as a GPU worker does\n"
        "from vllm.model_executor.custom_op import op_registry_oot\n"
        "for seam, before in zip(SEAMS, stock):\n"
        "    changed = resolve(seam.target) != before\n"
        "    assert changed == (seam.kind == 'wrapped'), seam\n"
        "assert sorted(op_registry_oot) == ['MoERunner', 'RoutedExperts'], op_registry_oot\n"
    )
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, cwd=IN_TREE.parent.parent)
    assert result.returncode == 0, result.stderr[-2000:]


def test_the_installed_version_is_supported():
    """The range that the package declares holds the vLLM that the tests run on."""
    assert unsupported_version() is None
    assert "0.31.0" not in SUPPORTED and "0.34.0" not in SUPPORTED


def test_another_plugin_in_our_place_is_named(monkeypatch):
    """Two plugins cannot both replace a layer class; the message says which the other one is."""
    other = type("OtherRoutedExperts", (), {"__module__": "other_plugin"})
    monkeypatch.setitem(layers.op_registry_oot, "RoutedExperts", other)
    with pytest.raises(RuntimeError, match=r"other_plugin\.OtherRoutedExperts"):
        layers.install()
