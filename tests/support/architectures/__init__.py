# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A small model of every architecture that vLLM serves through its fused-MoE layer:
random weights, 16 experts, top-2 unless said otherwise."""

from tests.support.architectures.described import DESCRIBED
from tests.support.architectures.model import COMMON, EXPERTS, TOP_K, Architecture
from tests.support.architectures.pictures import SEEING, Seeing
from tests.support.architectures.stock_ends import STOCK_ENDS
from tests.support.architectures.text import TEXT

ARCHITECTURES = (*TEXT, *DESCRIBED, *SEEING, *STOCK_ENDS)
"""Those that run from slots, then those that stock cannot run on the CPU platform."""

__all__ = [
    "ARCHITECTURES",
    "COMMON",
    "DESCRIBED",
    "EXPERTS",
    "SEEING",
    "STOCK_ENDS",
    "TEXT",
    "TOP_K",
    "Architecture",
    "Seeing",
]
