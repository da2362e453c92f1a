# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The methods of vLLM that we wrap: putting the wraps in place, and seeing who else
has."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from inspect import getattr_static
from operator import is_
from types import FunctionType, ModuleType
from typing import Any

_NEUTRAL = ("vllm", "torch", "functools", "contextlib", "typing")
"""Packages whose decorators stand around vLLM's own methods."""


@dataclass(frozen=True)
class Wrap:
    """`function` in the place of `owner.name`, around what was there (its
    `__wrapped__`)."""

    owner: type | ModuleType
    name: str
    function: Callable[..., Any]

    @property
    def target(self) -> str:
        return f"{self.owner.__name__}.{self.name}"


_installed: list[Wrap] = []


def install(*wraps: Wrap) -> None:
    """Puts all of them in place, static and class methods as what they are."""
    for wrap in wraps:
        stock = getattr_static(wrap.owner, wrap.name)
        kind = type(stock) if isinstance(stock, staticmethod | classmethod) else None
        setattr(wrap.owner, wrap.name, kind(wrap.function) if kind else wrap.function)
        _installed.append(wrap)


def lost() -> str | None:
    """The first of our wraps that another plugin replaced without calling it, and by
    what; None if all are in place, be it under wraps of others."""
    for wrap in _installed:
        current = getattr_static(wrap.owner, wrap.name)
        if not _path(current, partial(is_, wrap.function)):
            return f"{wrap.target} by {_name(_plain(current))}"
    return None


def shared() -> list[str]:
    """Which of the methods that we wrap others have wrapped too, each as `method:
    who`."""
    found = []
    for wrap in _installed:
        stock = getattr(wrap.function, "__wrapped__", None)
        above = _path(
            getattr_static(wrap.owner, wrap.name), partial(is_, wrap.function)
        )
        below = _path(stock, _is_neutral) or [_plain(stock), None]
        others = [_name(f) for f in (*above[:-1], *below[:-1]) if not _is_neutral(f)]
        if others:
            found.append(f"{wrap.target}: {', '.join(others)}")
    return found


def _path(start: Any, is_goal: Callable[[Any], bool]) -> list[Any]:
    """The calls that lead from one function to another, both included; empty if none
    are seen."""
    pending, seen = [[_plain(start)]], set()
    while pending:
        path = pending.pop(0)
        function = path[-1]
        if not callable(function) or isinstance(function, type) or id(function) in seen:
            continue
        if is_goal(function):
            return path
        seen.add(id(function))
        pending += [[*path, _plain(held)] for held in _callees(function)]
    return []


def _callees(function: Any) -> Iterator[Any]:
    """What a function could call: what it wraps by `functools.wraps`, and, unless it is
    vLLM's own, what it holds in a closure or a default or names in its module."""
    yield getattr(function, "__wrapped__", None)
    if isinstance(function, FunctionType) and not _is_neutral(function):
        cells = [
            cell.cell_contents for cell in function.__closure__ or () if _is_set(cell)
        ]
        named = [function.__globals__.get(name) for name in function.__code__.co_names]
        for held in (*cells, *named, *(function.__defaults__ or ())):
            yield from held.values() if isinstance(held, dict) else [held]


def _is_set(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _plain(function: Any) -> Any:
    """The function in a static, class or bound method, or in a partial."""
    while True:
        if isinstance(function, partial):
            function = function.func
        elif hasattr(function, "__func__"):
            function = function.__func__
        else:
            return function


def _module(function: Any) -> str:
    # functools.wraps copies __module__ and __qualname__ from what is wrapped.
    names = getattr(function, "__globals__", None)
    return names.get("__name__", "?") if names else type(function).__module__


def _is_neutral(function: Any) -> bool:
    return _module(function).partition(".")[0] in _NEUTRAL


def _name(function: Any) -> str:
    code = getattr(function, "__code__", None)
    name = code.co_qualname if code else type(function).__qualname__
    return f"{_module(function)}.{name}"
