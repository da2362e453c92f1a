# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The table of seams is complete: every name of vLLM that we import stands in it, but
for what is public beyond doubt."""

import ast
import importlib
import inspect
from collections.abc import Iterator
from typing import Any

import vllm
from tests.support import ROOT
from tools.mypy_vllm import OURS
from vllm.plugins.moe_gpu_prefetch.stock.seams import SEAMS

PUBLIC = {
    "vllm.config:ModelConfig",
    "vllm.config:VllmConfig",
    "vllm.config:get_current_vllm_config",
    "vllm.config:set_current_vllm_config",
    "vllm.config.utils:config",
    "vllm.distributed:get_world_group",
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


def imported() -> Iterator[tuple[str, str]]:
    """The module and the name of each import from stock vLLM."""
    for package in OURS:
        for file in (ROOT / package.replace(".", "/")).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and node.module:
                    for alias in node.names:
                        yield node.module, alias.name


def value_of(module: str, name: str) -> Any:
    """What is imported; None where only another version or platform has it."""
    try:
        found = importlib.import_module(module)
        if hasattr(found, name):
            return getattr(found, name)
        return importlib.import_module(f"{module}.{name}")
    except ImportError:
        return None


def test_every_name_that_we_import_is_a_seam():
    """Under whichever module we import it from, or a class with a seam."""
    seams = [seam.target.split(":") for seam in SEAMS]
    modules = {module for module, _ in seams}
    known = {(module, name.partition(".")[0]) for module, name in seams}
    known |= {tuple(name.split(":")) for name in PUBLIC}
    definitions = [value_of(*name) for name in known]
    found, unknown = 0, []
    for module, name in set(imported()):
        if not module.startswith("vllm.") or module.startswith(OURS):
            continue
        if (value := value_of(module, name)) is None:
            continue
        found += 1
        if (module, name) in known:
            continue
        if inspect.ismodule(value):
            is_known = value.__name__ in modules or value.__name__.startswith(OURS)
        else:
            is_known = any(value is definition for definition in definitions)
        if not is_known:
            unknown.append(f"{module}:{name}")
    assert not unknown
    assert found > 40, vllm.__version__
