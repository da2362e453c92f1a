# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Sizes as people write them."""

import pytest

from vllm.model_executor.layers.fused_moe.expert_slots.sizes import size_in_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 << 30),
        (" 40 GB ", 40 * 10**9),
        ("500mib", 500 << 20),
        ("1.5GiB", 3 << 29),
    ],
)
def test_sizes(text, size):
    assert size_in_bytes(text) == size


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("24", "no unit: say 24GiB"),
        ("0GiB", "is zero bytes"),
        *(
            (text, "is not a size")
            for text in ("", "GiB", "24XB", "24GiB foo", "24,5GiB", "1.2.3GB")
        ),
    ],
)
def test_what_is_no_size(text, words):
    with pytest.raises(ValueError, match=words):
        size_in_bytes(text)
