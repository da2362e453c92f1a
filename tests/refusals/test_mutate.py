# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""`python -m tools.mutate` finds the refusals, and takes out one at a time."""

import ast
import subprocess
import sys

import pytest

from tests.support import ROOT
from tools.mutate import CUDA_TESTS, NOTHING, TESTS, Without

MODULE = '''
CONFLICTS = ("one", "two")

def reason(asked) -> str | None:
    """Not a refusal: the text, None, and what another kind of function returns."""
    if asked:
        return "three"
    return first() or second()

def refuse(asked) -> str:
    try:
        raise ValueError("six")
    except ValueError:
        raise
    return None
'''


def without(number: int | None) -> tuple[list[str], str]:
    mutation = Without(number)
    changed = mutation.visit(ast.parse(MODULE))
    return mutation.found, ast.unparse(ast.fix_missing_locations(changed))


def test_each_is_found():
    found, unchanged = without(None)
    assert [text.partition(": ")[2] for text in found] == [
        *("'one'", "'two'", "return 'three'", "first()", "second()"),
        "raise ValueError('six')",
    ]
    assert unchanged == ast.unparse(ast.parse(MODULE))


@pytest.mark.parametrize(
    ("number", "before", "after"),
    [
        (0, "('one', 'two')", "('two',)"),
        (2, "return 'three'", "return None"),
        (3, "first()", "None"),
        (5, "raise ValueError('six')", "pass"),
    ],
)
def test_one_is_taken_out(number, before, after):
    _, changed = without(number)
    assert changed == ast.unparse(ast.parse(MODULE)).replace(before, after)


def test_a_text_with_the_name_of_a_list_is_left():
    mutation = Without(0)
    mutation.visit(ast.parse('CONFLICTS = "one"'))
    assert mutation.found == []


def test_the_test_that_notices_is_named(tmp_path):
    """A module with two refusals, and a test of the first alone."""
    module = tmp_path / "small.py"
    module.write_text(
        "def refuse(number):\n"
        "    if number < 1:\n        raise ValueError('below 1')\n"
        "    if number > 9:\n        raise ValueError('above 9')\n"
    )
    test = tmp_path / "test_small.py"
    test.write_text(
        "import pytest, small\n"
        "def test_below():\n    with pytest.raises(ValueError): small.refuse(0)\n"
    )
    mutants = ("", f"{module}@0", f"{module}@1")
    script = (
        "from tools.mutate import noticed_by\n"
        f"for mutant in {mutants}: print(noticed_by(({str(test)!r},), mutant))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT
    )
    unchanged, first, second = ended.stdout.splitlines()
    assert first.endswith("test_small.py::test_below"), ended.stderr
    assert unchanged == second == NOTHING


@pytest.mark.parametrize("name", {**TESTS, **CUDA_TESTS})
def test_the_table_names_what_is_there(name):
    [file] = (ROOT / "vllm").rglob(f"*/{name}")
    counted = Without()
    counted.visit(ast.parse(file.read_bytes()))
    assert counted.found
    for tests in (table[name] for table in (TESTS, CUDA_TESTS) if name in table):
        assert all((ROOT / path).exists() for path in tests)
