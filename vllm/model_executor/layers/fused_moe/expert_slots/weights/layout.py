# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""How a tensor of E rows is cut into memory that it shares and memory of its own.

The first rows of a tensor are staging rows, which are the same for all tensors of a
role. The others are its own slots.

    layer 0   | staging rows, shared     | slots, its own |
    layer 1   | the same memory          | slots, its own |
    mapped    | handle | handle | ... | h | private handle |

Only whole pages can be shared, so the page in which the staging rows end is private.
That is right because what one tensor writes to a staging row is never read through
another tensor.
"""

from collections.abc import Hashable, Iterable, Sequence

_HANDLES = 16
"""The most handles that one tensor adds to the staging of its role: enough that a
tensor of another size finds most of its bytes in whole handles, and few to map."""


def split(count: int, staged: int, row_bytes: int, page: int) -> tuple[int, int]:
    """Bytes of the shared and of the private part of a tensor.

    Args:
        count: rows of the tensor.
        staged: how many of them, the first ones, are staging rows.
        row_bytes: bytes of a row.
        page: bytes of a page, the unit of mapping.
    """
    assert 0 <= staged < count and row_bytes > 0, (count, staged, row_bytes)
    shared = staged * row_bytes // page * page
    return shared, -(-count * row_bytes // page) * page - shared


def fit(sizes: Sequence[int], shared: int, page: int) -> tuple[list[int], list[int]]:
    """The handles that make up `shared` bytes of staging. Tensors of equal size get
    equal handles.

    Args:
        sizes: bytes of the handles that the role has already.
        shared: bytes that the tensor shares, a multiple of `page`.
        page: bytes of a page.

    Returns:
        The indices into `sizes` of the handles to use, each of them whole, and the
        sizes of the handles to make.
    """
    taken = []
    for index, size in enumerate(sizes):
        if size <= shared:
            taken.append(index)
            shared -= size
    usual = -(-shared // (_HANDLES * page)) * page
    size = max(usual, sizes[0] if sizes else page)
    whole, rest = divmod(shared, size)
    return taken, [size] * whole + [rest] * (rest > 0)


def committed_bytes(
    tensors: Iterable[tuple[Hashable, int, int, int]], page: int
) -> int:
    """Bytes that tensors take if they are made in this order.

    Args:
        tensors: (role, rows, staging rows, bytes of a row) of each.
        page: bytes of a page.
    """
    staging: dict[Hashable, list[int]] = {}
    total = 0
    for role, count, staged, row_bytes in tensors:
        shared, private = split(count, staged, row_bytes, page)
        if not shared:
            total += count * row_bytes
            continue
        sizes = staging.setdefault(role, [])
        sizes += fit(sizes, shared, page)[1]
        total += private
    return total + sum(map(sum, staging.values()))
