# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The layers of these tests have no names, so they must not share a counter file that
an engine's directory in the environment would give them."""

import pytest

from vllm.model_executor.layers.fused_moe.expert_slots.counters import (
    DIRECTORY_VARIABLE,
)


@pytest.fixture(autouse=True)
def no_directory(monkeypatch):
    monkeypatch.delenv(DIRECTORY_VARIABLE, raising=False)
