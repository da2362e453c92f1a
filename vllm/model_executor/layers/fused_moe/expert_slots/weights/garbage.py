# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Memory that is no longer referred to and waits until it may be freed.

One list for the whole process: the memory of an engine that has ended may have to wait
until the next engine has captured its graphs.
"""

from collections.abc import Callable

_garbage: list[tuple[Callable[[], bool], Callable[[], object]]] = []
"""For each piece, a function that says whether it must wait, and one that frees it."""


def discard(must_wait: Callable[[], bool], free: Callable[[], object]) -> None:
    """Calls `free` as soon as `must_wait` says no: now, or in a later `sweep`."""
    _garbage.append((must_wait, free))
    sweep()


def sweep() -> None:
    """Frees what need not wait any more."""
    later = []
    try:
        while _garbage:
            try:
                must_wait, free = _garbage.pop()
            except IndexError:
                break  # a finaliser called this function meanwhile and took the last
            if must_wait():
                later.append((must_wait, free))
            else:
                free()
    finally:
        _garbage.extend(later)
