# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Types of the command's arguments, for argparse."""

import argparse
import re

from vllm.model_executor.layers.fused_moe.expert_slots.sizes import size_in_bytes


def size(value: str) -> int:
    """Reads `12GiB`. Returns bytes."""
    try:
        return size_in_bytes(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def duration(value: str) -> float:
    """Reads `12ms`, `800us` or `0.01s`. Returns seconds."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|ms|us)\s*", value, re.ASCII)
    seconds = (
        float(match[1]) * {"s": 1, "ms": 1e-3, "us": 1e-6}[match[2]] if match else 0
    )
    if not seconds:
        raise argparse.ArgumentTypeError(f"{value!r} is not a time like 12ms or 0.01s")
    return seconds


def positive(value: str) -> int:
    """Reads a whole number of at least 1."""
    if not value.isdecimal() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"{value!r} is not a number of at least 1")
    return int(value)


def counts(value: str) -> list[int]:
    """Reads `16,32,64`. Returns the numbers in ascending order, each once."""
    try:
        return sorted({positive(count.strip()) for count in value.split(",")})
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"{value!r} is not a list of numbers like 16,32,64"
        ) from None
