# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A GPU's free memory after loading is held against what loading took."""

import pytest

from vllm.model_executor.layers.fused_moe.expert_slots.capacity.device_memory import (
    DeviceUse,
    shortfall,
)

GIB = 1 << 30


def use(total, free, held):
    return DeviceUse(int(total * GIB), int(free * GIB), int(held * GIB))


BEFORE = use(24, 23, 0.5)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (BEFORE, use(24, 11, 12.5)),
        (BEFORE, use(24, 10, 12.5)),
        (use(24, 18, 0.5), use(24, 11, 12.5)),
        (use(24, 10, 0.5), use(24, 11.5, 12.5)),
        (use(24, 11, 0.5), use(24, 11.3, 0.2)),
        (BEFORE, use(24, 0.2, 23.3)),
    ],
    ids=[
        "exact",
        "kernels and libraries",
        "another ended",
        "another made room",
        "cache given back",
        "full",
    ],
)
def test_what_loading_explains_is_not_mentioned(before, after):
    """Within 0.5 GiB and a twentieth; a GPU that is full and holds everything does not
    page."""
    assert shortfall(before, after) is None


def test_memory_that_another_process_took_is_said_with_figures():
    """Expected, found, missing; and what it means."""
    warning = shortfall(BEFORE, use(24, 8, 12.5))
    assert (
        "8.00 GiB of GPU memory are free after loading, 11.00 GiB were expected"
        in warning
    )
    assert "(23.00 GiB free before, 12.00 GiB loaded): 3.00 GiB are missing" in warning
    assert "\n" not in warning and "--moe-gpu-prefetch" in warning
    limit = 11 - 0.5 - 12 / 20
    assert shortfall(BEFORE, use(24, limit - 0.01, 12.5)) is not None
    assert shortfall(BEFORE, use(24, limit + 0.01, 12.5)) is None


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (BEFORE, use(24, 0.1, 26.5)),  # more than there is
        (use(24, 18, 0.5), use(24, 0.1, 22.5)),  # a desktop has the rest
        (BEFORE, use(24, 6, 22.5)),  # the driver moved some out, and reports it as free
    ],
    ids=["beyond the total", "beyond what was free", "held and free"],
)
def test_a_driver_that_pages_is_said(before, after):
    """The GPU cannot hold what it was given, and nothing failed."""
    warning = shortfall(before, after)
    assert (
        "The driver keeps a part in host memory" in warning
        and "Sysmem Fallback" in warning
    )
    assert "\n" not in warning
