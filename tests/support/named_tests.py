# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Tables name tests as `room/test_file.py::test_name`, below tests/."""

import ast
from functools import cache

from tests.support import ROOT


def is_there(test: str) -> bool:
    file, _, name = test.partition("::")
    return name in _functions(file)


@cache
def _functions(file: str) -> set[str]:
    path = ROOT / "tests" / file
    tree = ast.parse(path.read_text(encoding="utf-8") if path.exists() else "")
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
