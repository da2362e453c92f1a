# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The Python sources of a vLLM release, fetched with pip once and kept below the
environment."""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import vllm

CACHE = Path(sys.prefix) / "vllm-releases"


def sources(version: str) -> Path:
    """A directory whose `vllm/` holds that version's Python files: the installed one's,
    or those of the wheel, which is deleted once they are out of it. Nothing of them is
    ever imported.

    Raises:
        RuntimeError: pip could not get the wheel; carries what it said.
    """
    if vllm.__version__.partition("+")[0] == version:
        return Path(find_spec("vllm").origin).parent.parent
    home = CACHE / version
    if not home.is_dir():
        CACHE.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as work:
            unpacked = Path(work) / "unpacked"
            with zipfile.ZipFile(_wheel(version, Path(work))) as wheel:
                wheel.extractall(
                    unpacked, (n for n in wheel.namelist() if n.endswith(".py"))
                )
            shutil.rmtree(home, ignore_errors=True)
            unpacked.rename(home)
    return home


def _wheel(version: str, directory: Path) -> Path:
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "download",
        "--quiet",
    ]
    # Any platform's wheel does: this names the one that there is, on whatever host this
    # runs.
    wheel = ["--no-deps", "--only-binary=:all:", "--platform=manylinux_2_28_x86_64"]
    result = subprocess.run(
        [*pip, *wheel, f"--dest={directory}", f"vllm=={version}"],
        capture_output=True,
        text=True,
    )
    if result.returncode:
        raise RuntimeError(
            f"the sources of vLLM {version} are needed to check our use of them, and "
            f"pip could not "
            f"download its wheel:\n{result.stderr[-1000:]}"
        )
    (wheel_file,) = directory.glob("*.whl")
    return wheel_file
