# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The GPU's code in an engine's workers too: a plugin of vLLM where this directory is
on the path."""

import pytest


def register() -> None:
    from tests.support.stand_in import stand_in

    stand_in(pytest.MonkeyPatch())
