# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Compiles kernels with the Triton of each torch that users have, in a process per
version.

A process reads requests on its standard input, one JSON line each, and answers with the
path of a file that holds PTX; it needs no GPU.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

RELEASES = {"3.7.1": "torch 2.13, vLLM 0.32", "3.8.0": "torch 2.14, vLLM 0.33"}
"""What torch's wheels for CUDA require."""

INSTALLED = "installed"
VERSIONS = (*RELEASES, INSTALLED)
CACHE = Path(sys.prefix) / "triton-releases"


def environment(version: str) -> dict[str, str]:
    """The environment of a process that compiles with that version."""
    found = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    first = [] if version == INSTALLED else [str(_release(version))]
    found["PYTHONPATH"] = os.pathsep.join(
        [*first, *filter(None, [found.get("PYTHONPATH")])]
    )
    return found


def _release(version: str) -> Path:
    """Where that version lies, fetched with pip once and kept below the environment.

    Raises:
        RuntimeError: pip could not get the wheel; carries what it said.
    """
    home = CACHE / version
    if not home.is_dir():
        CACHE.mkdir(exist_ok=True)
        pip = [
            sys.executable,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "download",
            "--quiet",
        ]
        with tempfile.TemporaryDirectory(dir=CACHE) as work:
            result = subprocess.run(
                [
                    *pip,
                    "--no-deps",
                    "--only-binary=:all:",
                    f"--dest={work}",
                    f"triton=={version}",
                ],
                capture_output=True,
                text=True,
            )
            if result.returncode:
                raise RuntimeError(
                    f"Triton {version} ({RELEASES[version]}) is needed to compile our "
                    f"kernels as "
                    f"users do, and pip could not download it:\n{result.stderr[-1000:]}"
                )
            (wheel,) = Path(work).glob("*.whl")
            unpacked = Path(work) / "unpacked"
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(unpacked)
            for tool in unpacked.glob("triton/backends/nvidia/bin/*"):
                tool.chmod(0o755)
            shutil.rmtree(home, ignore_errors=True)
            unpacked.rename(home)
    return home


class Compiler:
    """One version's process."""

    def __init__(self, version: str):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.ptx.triton_versions"],
            env=environment(version),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.version = self._answer()

    def ptx(self, **request: Any) -> tuple[str, int]:
        """PTX and bytes of shared memory; takes what `_compile` takes."""
        print(json.dumps(request), file=self._process.stdin, flush=True)
        ptx, shared = self._answer()
        return ptx, shared

    def _answer(self) -> Any:
        line = self._process.stdout.readline()
        assert line, f"the compiler's process ended with {self._process.wait()}"
        return json.loads(line)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def _compile(
    path: str,
    kernel: str,
    signature: dict[str, str],
    constants: dict[str, int],
    aligned: list[str],
    architecture: int,
    num_warps: int,
) -> tuple[str, int]:
    from tools.compile_kernels import compile_with

    function = _module(path)[kernel]
    made = compile_with(
        function, signature, constants, aligned, architecture, num_warps
    )
    return made.asm["ptx"], made.metadata.shared


@cache
def _module(path: str) -> dict[str, Any]:
    """The names of the module at `path`, which may be a changed copy of one of ours."""
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location(f"kernels_{len(path)}_{abs(hash(path))}", path)
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return vars(module)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what others print is no answer
    import triton

    print(json.dumps(triton.__version__), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(_compile(**json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
