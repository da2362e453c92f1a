# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What differs in a release of vLLM, supported or not: `make compat VERSION=0.34.0`.

It fetches the release, checks our types against its sources, looks for every seam in
it, and runs the tests that need no GPU. Each part runs although one before it failed.
docs/upgrading-vllm.md says what to do about a difference.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement

from tools.type_check import ROOT, check
from tools.vllm_versions import release
from vllm.plugins.moe_gpu_prefetch.stock.seam import SUPPORTED

SEAMS = (
    "tests/plugin/test_seams.py::test_the_seam_is_there",
    "tests/plugin/test_seams.py::"
    "test_wrapped_and_replaced_seams_are_the_ones_that_we_touch",
)
TESTS = ("tests/plugin", "tests/engine", "tests/matrix", "tests/compatibility")


def missing_requirements(directory: Path) -> Iterator[str]:
    """Packages that the release in `directory` requires and the environment lacks. Most
    of them are for GPUs."""
    (information,) = directory.glob("vllm-*.dist-info")
    for line in Distribution.at(information).requires or ():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            try:
                version(requirement.name)
            except PackageNotFoundError:
                yield requirement.name


def passes(asked: str, *tests: str) -> bool:
    """Whether those tests pass on the release."""
    command = [sys.executable, "-m", "pytest", "--tb=short", *tests]
    run = subprocess.run(command, cwd=ROOT, env={**os.environ, "TEST_VLLM": asked})
    return run.returncode == 0


def differs(asked: str) -> list[str]:
    """The parts that failed on the release, by name.

    Raises:
        LookupError: it could not be fetched.
    """
    lacking = ", ".join(missing_requirements(release(asked))) or "nothing"
    print(f"vLLM {asked} requires and this environment lacks: {lacking}\n")
    parts = {"types": lambda: check(asked), "seams": lambda: passes(asked, *SEAMS)}
    if asked in SUPPORTED:
        parts["tests"] = lambda: passes(asked, *TESTS)
    return [name for name, passed in parts.items() if not passed()]


def main(arguments: list[str]) -> str | None:
    """Prints what differs; returns what to end with, None if nothing does."""
    if len(arguments) != 1 or not arguments[0]:
        return "Give one version: make compat VERSION=0.33.0"
    (asked,) = arguments
    try:
        failed = differs(asked)
    except LookupError as error:
        return str(error)
    if failed:
        return f"vLLM {asked} differs in: {', '.join(failed)}. See above."
    if asked not in SUPPORTED:
        return (
            f"vLLM {asked}: types and seams are as we know them. The tests of slots "
            f"did not run, because {SUPPORTED} is the supported range. Widen it in "
            "stock/seam.py and run this again."
        )
    print(f"vLLM {asked} works: types, seams and tests.")
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
