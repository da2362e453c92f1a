# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a method wraps is found through `__wrapped__`, which other plugins set."""

from itertools import islice

from vllm.plugins.moe_gpu_prefetch.stock.wrapping import _wraps


def test_a_cycle_ends():
    """Two functions that say that they wrap each other: each is given once."""

    def first():
        pass

    def second():
        pass

    vars(first)["__wrapped__"], vars(second)["__wrapped__"] = second, first
    assert list(islice(_wraps(first), 5)) == [first, second]
