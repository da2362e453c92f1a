# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What stock keeps of a layer besides tensors: the numbers and words that its method,
its quantisation config and its kernel refer to. A kernel may read any of them."""

from collections.abc import Iterator
from enum import Enum
from typing import Any

import torch

_LEAVES = (bool, int, float, str, type(None), Enum, torch.dtype, torch.device)


def numbers_of(layer: torch.nn.Module) -> dict[str, str]:
    """Path -> value, of all that can be reached from a layer through dicts, sequences
    and objects of vLLM's classes. Other modules are left out."""
    seen: set[int] = set()
    return {
        path: value
        for name, start in vars(layer).items()
        for path, value in _reached(name, start, seen)
    }


def _reached(path: str, value: Any, seen: set[int]) -> Iterator[tuple[str, str]]:
    if isinstance(value, _LEAVES):
        yield path, repr(value)
        return
    if isinstance(value, torch.nn.Module | torch.Tensor | type) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, set | frozenset):
        yield path, repr(sorted(map(repr, value)))
        return
    if isinstance(value, dict):
        items = [(str(key), entry) for key, entry in value.items()]
    elif isinstance(value, list | tuple):
        items = [(str(place), entry) for place, entry in enumerate(value)]
    elif type(value).__module__.startswith("vllm."):
        items = list(getattr(value, "__dict__", {}).items())
    else:
        return
    for name, entry in items:
        yield from _reached(f"{path}.{name}", entry, seen)
