# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The type check notices each way in which a release of vLLM may differ, in a small
vLLM and a small package of ours."""

import re
from pathlib import Path

import pytest
from mypy import api

from tools.type_check import SWITCHES, command
from vllm.model_executor.layers.fused_moe.expert_slots import versions

STOCK = {
    "__init__.py": "",
    "plugins/__init__.py": "",
    "facade.py": "from .home import *\nfrom vllm.home import Layer as Renamed",
    "home.py": """
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

def run(layer: Layer, times: int, *, verbose=False) -> None: ...
""",
}
OURS = """
import functools
from typing import TYPE_CHECKING, Any
from vllm.facade import Config, Renamed, run

if TYPE_CHECKING:
    from vllm.facade import Renamed as _Base
else:
    _Base = object

VLLM_0_33 = bool()

class Mixin(_Base):
    def forward(self, x: Any, weights: Any, *args: Any, **kwargs: Any) -> Any:
        self.inherited(x, b=self.config.width)
        return super().forward(x, weights, ids=None)

class Ours(Mixin, Renamed):
    def step(self, x: Any, scale: int = 2) -> None: ...

@functools.wraps(run)
def run_ours(layer: Renamed, times: int, *, verbose: bool = False) -> None: ...

def use(layer: Renamed) -> int:
    run(layer, times=2, verbose=True)
    made, config = Renamed.make(Config(width=1)), layer.config
    return made.inherited(1).depth + config.width
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("mypy")


@pytest.fixture
def problems(tmp_path, cache, monkeypatch):
    """What mypy says of `ours` on `stock`, as a release of `version`."""

    def problems(
        stock: str = STOCK["home.py"], ours: str = OURS, version: str = "0.33.0"
    ) -> str:
        write(tmp_path / "release" / "vllm", STOCK | {"home.py": stock})
        package = tmp_path / "ours" / "vllm" / "plugins" / "moe_gpu_prefetch"
        write(package, {"__init__.py": "", "m.py": ours})
        monkeypatch.setenv("MYPYPATH", str(tmp_path / "release"))
        monkeypatch.chdir(tmp_path / "ours")
        options = (f"--cache-dir={cache}", "--package=vllm.plugins.moe_gpu_prefetch")
        _, _, *arguments = command(version, *options)
        output, errors, status = api.run(arguments[1:])
        assert (status == 0) == output.startswith("Success"), output + errors
        return "" if status == 0 else output + errors

    return problems


def write(directory: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_what_fits_is_accepted(problems):
    """Re-exports, star imports, inheritance, dataclasses, class methods, mixins."""
    assert not problems()


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("def run(", "def execute(", 'has no attribute "run"'),
        ("times: int", "repeats: int", 'Unexpected keyword argument "times"'),
        ("times: int", "repeats: int", "has times where stock has repeats"),
        ("verbose=False", "quiet=False", 'Unexpected keyword argument "verbose"'),
        ("verbose=False", "quiet=False", "run_ours stands in for what it wraps"),
        ("width: int", "hidden: int", 'Unexpected keyword argument "width"'),
        ("depth: int", "layers: int", '"Config" has no attribute "depth"'),
        ("weights, ids=None", "topk, weights", "has weights where stock has topk"),
        ("x, scale=1", "x, factor=1", "has scale where stock has factor"),
        ("x, scale=1", "x, scale=1, bias=0", "takes no bias"),
        ("def inherited(self, a", "def inherited(self, a, c", 'argument "c"'),
        ("def inherited", "def renamed", '"Mixin" has no attribute "inherited"'),
        ("self.config = config", "self.settings = config", 'no attribute "config"'),
        ("class Layer(Base)", "class Layer", '"Mixin" has no attribute "config"'),
    ],
)
def test_what_does_not_fit_is_named(problems, old, new, problem):
    """A renamed parameter, a removed attribute, a changed override: with the place."""
    assert STOCK["home.py"].count(old) == 1
    found = problems(STOCK["home.py"].replace(old, new))
    assert re.search(rf"m\.py:\d+: error: .*{re.escape(problem)}", found), found


@pytest.mark.parametrize(
    "line", ["from vllm.tasks import x", "from vllm import tasks", "import vllm.moved"]
)
def test_a_module_that_the_release_lacks_is_not_taken_from_the_installed_one(
    problems, line
):
    """The installed vLLM has vllm/tasks.py, this release has neither."""
    found = problems(ours=f"{line}\n")
    name = "vllm.moved" if "moved" in line else "vllm.tasks"
    assert found.endswith(f"m.py:1: error: no module {name} in this release\n")


def test_branches_are_followed_as_the_release_would(problems):
    """`if VLLM_0_33:` hides from each version what is for the others."""
    ours = OURS + (
        "\nif VLLM_0_33:\n    from vllm.home import run as _\n"
        "else:\n    from vllm.old import x\n"
    )
    assert not problems(ours=ours)
    assert "no module vllm.old" in problems(ours=ours, version="0.32.0")


def test_every_switch_is_followed():
    """Those of versions.py are those that the check knows."""
    switches = {name for name in vars(versions) if name.startswith("VLLM_")}
    assert switches == set(SWITCHES)
