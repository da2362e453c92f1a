# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Every use that we make of vLLM holds in the sources of each supported version, read
and never imported: the seams, every name, attribute and call, and every method that
stands in for one."""

from pathlib import Path

import pytest

from tests.sources.our_uses import Checker, Uses
from tests.sources.vllm_release import sources
from tests.sources.vllm_tree import Missing, Tree
from vllm.plugins.moe_gpu_prefetch.stock.seams import SEAMS, SUPPORTED

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = (
    "vllm.model_executor.layers.fused_moe.expert_slots",
    "vllm.plugins.moe_gpu_prefetch",
)
VERSIONS = ("0.32.0", "0.33.0")

PUBLIC = {
    "vllm:",
    "vllm.config.model:ModelConfig",
    "vllm.config.utils:config",
    "vllm.config.vllm:VllmConfig",
    "vllm.config.vllm:get_current_vllm_config",
    "vllm.config.vllm:set_current_vllm_config",
    "vllm.distributed.parallel_state:get_world_group",
    "vllm.forward_context:get_forward_context",
    "vllm.forward_context:is_forward_context_available",
    "vllm.logger:init_logger",
    "vllm.model_executor.layers.fused_moe.activation:MoEActivation",
    "vllm.platforms:current_platform",
    "vllm.triton_utils:tl",
    "vllm.triton_utils:triton",
    "vllm.usage.usage_lib:UsageContext",
    "vllm.utils.torch_utils:LayerNameType",
    "vllm.utils.torch_utils:set_default_torch_dtype",
}
"""What every plugin uses; it needs no line in the table of seams."""


@pytest.fixture(scope="module", params=VERSIONS)
def version(request):
    return request.param


@pytest.fixture(scope="module")
def tree(version) -> Tree:
    return Tree(sources(version))


@pytest.fixture(scope="module")
def uses(version, tree) -> Uses:
    return Checker(tree, Tree(REPOSITORY), PACKAGES, newer=version != "0.32.0").run()


def test_the_versions_are_those_that_we_declare():
    """One of each minor version in the range."""
    assert all(version in SUPPORTED for version in VERSIONS)
    assert "0.31.9" not in SUPPORTED and "0.34.0" not in SUPPORTED


def test_every_seam_is_there(version, tree):
    """The name, and the parameters that we use."""
    problems = []
    for seam in SEAMS:
        if not seam.applies_to(version):
            continue
        try:
            found = tree.find(*seam.target.split(":"))
        except Missing as missing:
            problems.append(f"{seam.target}: {missing}; it {seam.reason}")
            continue
        if seam.parameters:
            missing = set(seam.parameters) - set(tree.signature(found).parameters)
            problems += [
                f"{seam.target} takes no {name}; it {seam.reason}" for name in missing
            ]
    assert not problems, "\n".join(problems)


def test_every_name_attribute_call_and_override_fits(uses):
    """Imports resolve, attributes exist, arguments bind, our methods are called as
    stock's."""
    assert not uses.problems, "\n".join(uses.problems)
    assert len(uses.imported) > 40 and uses.calls > 50 and uses.overrides >= 10


def test_every_name_that_we_import_is_a_seam(version, tree, uses):
    """The table is complete, but for what is public beyond doubt."""
    seams = [tree.find(*s.target.split(":")) for s in SEAMS if s.applies_to(version)]
    known = {
        (found.module, getattr(found.node, "lineno", 0))
        for seam in seams
        for found in (seam, seam.owner)
        if found is not None
    } | {(seam.target.partition(":")[0], 0) for seam in SEAMS}
    public = {tree.find(*name.split(":")) for name in PUBLIC}
    missing = {
        name
        for name, found in uses.imported.items()
        if (found.module, getattr(found.node, "lineno", 0)) not in known
        and found not in public
    }
    assert not missing


STOCK = {
    "vllm/__init__.py": "",
    "vllm/facade.py": "from .home import *\nfrom vllm.home import Layer as Renamed",
    "vllm/home.py": """
from dataclasses import dataclass

@dataclass
class Config:
    width: int
    depth: int = 1

class Base:
    def __init__(self, config: Config):
        self.config = config
    def inherited(self, a, *, b=0) -> Config: ...

class Layer(Base):
    @classmethod
    def make(cls, config: Config) -> "Layer": ...
    def forward(self, x, weights, ids=None): ...
    def step(self, x, scale=1): ...

def run(layer: Layer, times: int, *, verbose=False): ...
""",
}

OURS = """
from typing import TYPE_CHECKING
from vllm.facade import Config, Renamed, run

if TYPE_CHECKING:
    from vllm.facade import Renamed as _Base
else:
    _Base = object

class Mixin(_Base):
    def forward(self, x, weights, *args, **kwargs):
        self.inherited(x, b=self.config.width)
        return super().forward(x, weights, ids=None)

class Ours(Mixin, Renamed):
    def step(self, x, scale=2): ...

def use(layer: Renamed):
    run(layer, times=2, verbose=True)
    made, config = Renamed.make(Config(width=1)), layer.config
    return made.inherited(1).depth + config.width
"""


def problems(tmp_path, stock=STOCK, ours=OURS):
    for name, text in {**stock, "ours/m.py": ours, "ours/__init__.py": ""}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return Checker(Tree(tmp_path), Tree(tmp_path), ("ours",), newer=True).run()


def test_what_fits_is_accepted(tmp_path):
    """Re-exports, star imports, inheritance, dataclasses, class methods, mixins."""
    uses = problems(tmp_path)
    assert not uses.problems
    assert (len(uses.imported), uses.calls, uses.overrides) == (3, 6, 2)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("def run(", "def execute(", "vllm.facade has no run"),
        ("times: int", "repeats: int", "missing a required argument: 'repeats'"),
        ("verbose=False", "quiet=False", "unexpected keyword argument 'verbose'"),
        ("verbose=False", "seed", "missing a required argument: 'seed'"),
        ("width: int", "hidden: int", "missing a required argument: 'hidden'"),
        ("depth: int", "layers: int", "vllm.home:Config has no depth"),
        (
            "weights, ids=None",
            "topk, weights",
            "forward(self, x, topk, weights): has weights where stock has topk",
        ),
        (
            "weights, ids=None",
            "weights, *, table=0",
            "unexpected keyword argument 'ids'",
        ),
        (
            "x, scale=1",
            "x, factor=1",
            "step(self, x, factor=None): has scale where stock has factor",
        ),
        ("x, scale=1", "x, scale=1, bias=0", "takes no bias"),
        (
            "def inherited(self, a",
            "def inherited(self, a, c",
            "missing a required argument: 'c'",
        ),
        (
            "def inherited",
            "def renamed",
            "self.inherited is neither ours nor of vllm.home:Layer",
        ),
        (
            "self.config = config",
            "self.settings = config",
            "vllm.home:Layer has no config",
        ),
        ("class Layer(Base)", "class Layer", "self.config is neither ours nor of"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, old, new, problem):
    """Each way in which a version may differ is noticed, with the place and the
    name."""
    assert old in STOCK["vllm/home.py"]
    changed = {**STOCK, "vllm/home.py": STOCK["vllm/home.py"].replace(old, new)}
    found = "\n".join(problems(tmp_path, changed).problems)
    assert problem in found


def test_branches_are_followed_as_the_version_would(tmp_path):
    """`if VLLM_0_33:` hides from each version what is for the other."""
    ours = (
        OURS
        + "\nif VLLM_0_33:\n    from vllm.home import run\n"
        + "else:\n    from vllm.old import x\n"
    )
    assert not problems(tmp_path, ours=ours).problems
    old = Checker(Tree(tmp_path), Tree(tmp_path), ("ours",), newer=False).run().problems
    assert old == ["ours.m:26: no module vllm.old"]


def test_a_release_that_cannot_be_fetched_fails_with_what_pip_said():
    """Nothing is skipped silently."""
    with pytest.raises(
        RuntimeError, match=r"vLLM 0\.0\.0\.1 .*could not download(?s:.)+No matching"
    ):
        sources("0.0.0.1")
