# SPDX-License-Identifier: Apache-2.0
"""The GPU's code in an engine's workers too: a plugin of vLLM where this directory is on the
path."""

import sys
from pathlib import Path

import pytest


def register() -> None:
    sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (1, 2)]
    from stand_in import stand_in

    stand_in(pytest.MonkeyPatch())
