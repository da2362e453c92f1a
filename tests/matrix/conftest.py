# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""vLLM's Qwen3.5 and its models that see pictures import torchvision."""

from functools import cache

import pytest

from tests.support import torchvision_beside
from tests.support.left_out import left_out

if not torchvision_beside.use():

    def pytest_pycollect_makemodule(module_path, parent):
        reason = "transformers was imported without torchvision: pytest tests/matrix"
        return left_out(parent, module_path, reason)


@pytest.fixture(scope="module", autouse=True)
def large_dummies():
    from tests.support.architectures.checkpoint import make_dummies_large

    with pytest.MonkeyPatch.context() as patch:
        make_dummies_large(patch)
        yield


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory):
    """The checkpoint of an architecture, written once."""
    from tests.support.architectures.checkpoint import write_checkpoint

    directory = tmp_path_factory.mktemp("matrix")
    return cache(lambda architecture: write_checkpoint(directory, architecture))
