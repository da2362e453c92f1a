# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
import pytest

from tests.support.apart import run_apart


@pytest.fixture(scope="module")
def run_stock(tmp_path_factory):
    """Stock's answers with some options, asked once."""
    answers = tmp_path_factory.mktemp("stock")
    known = {}

    def ask(checkpoint, **options):
        key = repr((checkpoint, options))
        if key not in known:
            known[key] = run_apart(
                checkpoint, answers / f"{len(known)}.json", **options
            )
        return known[key]

    return ask
