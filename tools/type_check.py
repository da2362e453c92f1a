# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Checks the types of our packages against the sources of vLLM releases: each name that
we import, each attribute, each call and each method in the place of one of vLLM's.

Usage: python -m tools.type_check [VERSION ...]   (both supported ones if none is given)

vLLM is read, not imported. Where versions differ, the branches of `if VLLM_0_33` in
`expert_slots/versions.py` are followed as the release would follow them.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from packaging.version import Version

from tools.vllm_versions import VERSIONS, release

ROOT = Path(__file__).resolve().parents[1]
SWITCHES = {"VLLM_0_33": "0.33"}
"""The switches of `versions.py`, each with the first version for which it is true."""


def command(version: str, *options: str) -> list[str]:
    """mypy for that version, configured by pyproject.toml; MYPYPATH is the caller's to
    set."""
    switches = [
        f"--always-{Version(version) >= Version(first)}".lower() + f"={name}"
        for name, first in SWITCHES.items()
    ]
    config = f"--config-file={ROOT / 'pyproject.toml'}"
    return [sys.executable, "-m", "mypy", config, *switches, *options]


def check(version: str) -> bool:
    """Whether our packages fit that release; mypy prints what does not.

    Raises:
        LookupError: the release could not be fetched.
    """
    environment = {**os.environ, "MYPYPATH": str(release(version))}
    cache = f"--cache-dir={ROOT / '.mypy_cache' / version}"
    run = subprocess.run(
        command(version, cache),
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    print(f"vLLM {version}: {run.stdout}{run.stderr}", end="", flush=True)
    return run.returncode == 0


if __name__ == "__main__":
    try:
        with ThreadPoolExecutor() as pool:  # each waits for a mypy of its own
            sys.exit(not all(list(pool.map(check, sys.argv[1:] or VERSIONS))))
    except LookupError as error:
        sys.exit(str(error))
