# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The methods of vLLM that we wrap: puts our wraps in place, and finds the wraps of
other plugins around them and below them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import getattr_static
from types import ModuleType
from typing import Any

_NEUTRAL = ("vllm", "prometheus_client", "torch", "functools", "contextlib", "typing")
"""Packages that have the methods that we wrap, or decorators around them."""


@dataclass(frozen=True)
class Wrap:
    """`function` in the place of `owner.name`; it calls what was there, which is its
    `__wrapped__`."""

    owner: type | ModuleType
    name: str
    function: Callable[..., Any]

    @property
    def target(self) -> str:
        return f"{self.owner.__name__}.{self.name}"


_installed: list[Wrap] = []


def install(*wraps: Wrap) -> None:
    """Puts all of them in place; a static or class method stays one."""
    for wrap in wraps:
        stock = getattr_static(wrap.owner, wrap.name)
        kind = type(stock) if isinstance(stock, staticmethod | classmethod) else None
        setattr(wrap.owner, wrap.name, kind(wrap.function) if kind else wrap.function)
        _installed.append(wrap)


def lost() -> str | None:
    """The first method that another plugin has replaced without showing that it calls
    our wrap, as `method by function`; None if every wrap of ours is still called.

    A function shows what it calls by `__wrapped__`, which functools.wraps sets.
    """
    for wrap in _installed:
        outermost = getattr_static(wrap.owner, wrap.name)
        if wrap.function not in _wraps(outermost):
            return f"{wrap.target} by {_name(_plain(outermost))}"
    return None


def shared() -> list[str]:
    """Which of the methods that we wrap other plugins have wrapped too, each as
    `method: wrap, wrap`."""
    found = []
    for wrap in _installed:
        outermost = getattr_static(wrap.owner, wrap.name)
        others = [
            _name(function)
            for function in _wraps(outermost)
            if not _is_neutral(function)
        ]
        if others:
            found.append(f"{wrap.target}: {', '.join(others)}")
    return found


def _wraps(function: Any) -> Iterator[Any]:
    """A method and what it wraps, outermost first."""
    seen: list[Any] = []
    while function is not None and (function := _plain(function)) not in seen:
        seen.append(function)
        yield function
        function = getattr(function, "__wrapped__", None)


def _plain(function: Any) -> Any:
    """The function in a static, class or bound method."""
    return getattr(function, "__func__", function)


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
