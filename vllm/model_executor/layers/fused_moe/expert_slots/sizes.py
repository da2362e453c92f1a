# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Sizes in bytes, as people write and read them."""

import re

from pydantic import ByteSize, TypeAdapter, ValidationError

GIB = 1 << 30


def gib(num_bytes: int) -> str:
    """A size for messages: in GiB, or in MiB if it is less than a tenth of a GiB."""
    if num_bytes < GIB // 10:
        return f"{num_bytes / (1 << 20):,.1f} MiB"
    return f"{num_bytes / GIB:,.2f} GiB"


def size_in_bytes(text: str) -> int:
    """The bytes of `12GiB`, `12 GB` or `500MiB`.

    Raises:
        ValueError: the text is not a size, its unit is missing, or it is zero.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text, re.ASCII | re.I)
    number, unit = match.groups() if match else ("", "")
    try:
        size = int(TypeAdapter(ByteSize).validate_python(number + unit))
    except ValidationError:
        raise ValueError(f"{text!r} is not a size like 24GiB or 40GB") from None
    if not unit:
        raise ValueError(f"{text!r} has no unit: say {number}GiB, or GB or MiB")
    if size == 0:
        raise ValueError(f"{text!r} is zero bytes")
    return size
