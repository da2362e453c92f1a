# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""torchvision for the tests whose models import it, where the environment has none: the
Python of PyPI's wheel, unpacked once beside the environment.

vLLM demands torchvision, and the set-up for the CPU leaves it out: PyPI's is a build
for CUDA, whose library does not load beside a CPU build of torch, and then the package
cannot be imported at all. Resizing and normalising pictures needs none of that library.
"""

import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

VERSION = "0.28.0"
"""The release that goes with torch 2.13."""

HOME = Path(sys.prefix) / "torchvision" / VERSION

_libraries: list[torch.library.Library] = []


def use() -> bool:
    """Lets this process import torchvision. Whether it can: transformers looks for it
    once, when it is imported.

    Raises:
        LookupError: pip could not get it; carries what it said.
    """
    if importlib.util.find_spec("torchvision") is None:
        if "transformers" in sys.modules:
            return False
        sys.path.append(str(_unpacked()))
        _declare_what_the_library_would()
    return True


def _declare_what_the_library_would() -> None:
    """Two ops without a kernel: torchvision adds shape functions to them when it is
    imported."""
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(
            f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        )
    _libraries.append(library)  # it undoes its definitions when it is dropped


def _unpacked() -> Path:
    if not HOME.is_dir():
        HOME.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=HOME.parent) as work:
            unpacked = Path(work) / "unpacked"
            with zipfile.ZipFile(_wheel(Path(work))) as archive:
                names = [n for n in archive.namelist() if ".so" not in n]
                archive.extractall(unpacked, names)
            if not HOME.is_dir():  # another process may have been faster
                unpacked.rename(HOME)
    return HOME


def _wheel(directory: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
    what = ["--quiet", "--no-deps", "--only-binary=:all:", f"torchvision=={VERSION}"]
    result = subprocess.run(
        [*pip, *what, f"--dest={directory}"], capture_output=True, text=True
    )
    if result.returncode:
        said = [line for line in result.stderr.splitlines() if line.strip()] or ["?"]
        raise LookupError(f"torchvision {VERSION} could not be fetched: {said[-1]}")
    (file,) = directory.glob("*.whl")
    return file
