# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Takes each refusal out of the code once and runs the tests that should notice. Prints
a table: the refusal, and the first test that fails, or NOTHING. Exit status 1 if a
refusal can go unnoticed. No file is changed: the change is made while it is imported.

With TRITON_INTERPRET=1: the refusals of the CUDA platform."""

import argparse
import ast
import importlib
import importlib.machinery
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.support import ROOT, python_path

ARGUMENTS = ("tests/compatibility/test_refusals.py", "tests/plugin/test_flag.py")
LAYERS = ("tests/refusals", ARGUMENTS[0], "tests/engine/test_models.py")
PLUGINS = ("tests/plugin/test_register.py", "tests/plugin/test_coexistence.py")
ON_CUDA = ("tests/cuda/test_construction.py", "tests/cuda/test_cuda_backend.py")
TESTS = {
    "refusals/arguments.py": ARGUMENTS,
    "refusals/load_formats.py": ARGUMENTS,
    "refusals/layers.py": LAYERS,
    "refusals/formats.py": ("tests/refusals/test_formats.py",),
    "refusals/models.py": (*LAYERS, PLUGINS[1]),
    "cpu/backend.py": LAYERS,
    "stock/check.py": PLUGINS,
    "stock/seams.py": PLUGINS,
    "stock/wrapping.py": PLUGINS,
    "stock/unsupported.py": PLUGINS,
}
CUDA_TESTS = {
    "cuda/backend.py": ON_CUDA,
    "cuda/kernels.py": ("tests/quantised/test_kernel_choice.py", *ON_CUDA),
    "refusals/layers.py": ON_CUDA[:1],
}
LISTS = ("CONFLICTS", "UNTESTED", "DECODE_ATTRIBUTES")
NOTHING = "NOTHING"


class Without(ast.NodeTransformer):
    """Counts the refusals of a module, and takes out the one that is asked for: an
    element of `LISTS`, a `raise`, and what a function returns as a reason."""

    def __init__(self, number: int | None = None):
        self.number = number
        self.found: list[str] = []
        self._returns_reason = False

    def _taken(self, node: Any) -> bool:
        self.found.append(f"{node.lineno}: {' '.join(ast.unparse(node).split())}")
        return len(self.found) - 1 == self.number

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        returned = ast.unparse(node.returns) if node.returns else ""
        self._returns_reason = returned == "str | None"
        return self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        return ast.Pass() if node.exc and self._taken(node) else node

    def visit_Return(self, node: ast.Return) -> ast.AST:
        if not self._returns_reason or ast.unparse(node) == "return None":
            return node
        if isinstance(node.value, ast.BoolOp):
            none, values = ast.Constant(None), node.value.values
            values[:] = [none if self._taken(value) else value for value in values]
            return node
        return ast.Return(ast.Constant(None)) if self._taken(node) else node

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        elements = getattr(node.value, "elts", None)
        if elements is not None and ast.unparse(node.targets[0]) in LISTS:
            elements[:] = [e for e in elements if not self._taken(e)]
        return node


def install() -> None:
    """Makes this process import the module in MUTANT without the refusal in MUTANT."""
    file, _, number = os.environ.get("MUTANT", "").rpartition("@")
    get_code = importlib.machinery.SourceFileLoader.get_code

    def changed(loader: Any, name: str) -> Any:
        if loader.path != file:
            return get_code(loader, name)
        tree = Without(int(number)).visit(ast.parse(Path(file).read_bytes()))
        return compile(ast.fix_missing_locations(tree), file, "exec")

    importlib.machinery.SourceFileLoader.get_code = changed  # type: ignore


class FirstFailure:
    name = NOTHING

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and self.name == NOTHING:
            self.name = report.nodeid

    pytest_collectreport = pytest_runtest_logreport


def noticed_by(tests: tuple[str, ...], mutant: str) -> str:
    """The first test that fails, in a process forked from this one."""
    import pytest

    with tempfile.TemporaryDirectory() as place:
        # Processes that the tests start import it, too.
        hook = f"sys.path.append({str(ROOT)!r}); from tools.mutate import install"
        Path(place, "sitecustomize.py").write_text(f"import sys; {hook}; install()")
        answer = Path(place, "answer")
        pid = os.fork()
        if pid == 0:
            os.environ |= {"MUTANT": mutant, "PYTHONPATH": python_path(Path(place))}
            for descriptor in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
            install()
            failure = FirstFailure()
            pytest.main(["-x", "-p", "no:cacheprovider", *tests], plugins=[failure])
            answer.write_text(failure.name)
            os._exit(0)
        os.waitpid(pid, 0)
        return answer.read_text() if answer.exists() else "the tests' process ended"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("module", nargs="*", help="as in the table, else all")
    table = CUDA_TESTS if os.environ.get("TRITON_INTERPRET") == "1" else TESTS
    modules = parser.parse_args().module or list(table)
    # The environment of the tests first; then vLLM, once for all forks.
    for module in ("tests.conftest", "tests.cuda.conftest", "vllm.entrypoints.llm"):
        importlib.import_module(module)
    for tests in {table[name] for name in modules}:
        if (failing := noticed_by(tests, "")) != NOTHING:
            sys.exit(f"{failing} fails with every refusal in its place")
    unnoticed = 0
    for name in modules:
        [file] = (ROOT / "vllm").rglob(f"*/{name}")
        refusals = Without()
        refusals.visit(ast.parse(file.read_bytes()))
        for number, refusal in enumerate(refusals.found):
            test = noticed_by(table[name], f"{file}@{number}")
            unnoticed += test == NOTHING
            print(f"| {name}:{refusal[:80]} | {test} |", flush=True)
    return min(unnoticed, 1)


if __name__ == "__main__":
    sys.exit(main())
