# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which elements of a row a view of a tensor covers."""

from collections.abc import Iterator
from functools import cache
from math import prod

import torch

Region = tuple[int, tuple[tuple[int, int], ...]]
"""A part of the elements of one row: the offset of the first one, and (stride, size) of
each dimension."""


def by_row(
    offset: int, extents: tuple[tuple[int, int], ...], row: int
) -> Iterator[tuple[int, Region]]:
    """Splits a view of a tensor [E, ...] by the rows that it touches.

    Args:
        offset: elements before the view's first.
        extents: (stride, size) of its dimensions, by falling stride.
        row: elements of a row.

    Yields:
        The number of each row, and the region of it.
    """
    last = offset + sum(stride * (size - 1) for stride, size in extents)
    first = offset // row
    if last // row == first:
        yield first, (offset - first * row, extents)
    elif last - offset + 1 == prod(size for _, size in extents):  # without gaps
        for index in range(first, last // row + 1):
            begin, end = max(offset, index * row), min(last + 1, (index + 1) * row)
            yield index, (begin - index * row, ((1, end - begin),))
    else:
        (stride, size), *inner = extents
        for index in range(size):
            yield from by_row(offset + index * stride, tuple(inner), row)


@cache
def elements(row: int, regions: frozenset[Region]) -> int:
    """How many of the `row` elements of a row lie in one of `regions`."""
    sizes = [prod(size for _, size in extents) for _, extents in regions]
    if len(sizes) < 2:
        return sum(sizes)
    touched = torch.zeros(row, dtype=torch.bool)
    for offset, extents in regions:
        shape, strides = (
            [size for _, size in extents],
            [stride for stride, _ in extents],
        )
        touched.as_strided(shape, strides, offset).fill_(True)
    return int(touched.count_nonzero())
