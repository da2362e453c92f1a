# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The load that is going on in this worker: what its layers have to know, and vLLM does
not pass to their constructors."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchConfig
from vllm.model_executor.layers.fused_moe.expert_slots.shared_store.store import (
    SharedStore,
)


@dataclass(frozen=True)
class ModelLoad:
    """The load of one model with slots.

    Attributes:
        config: what the user asked for.
        draft: whether the model drafts for another one.
        store: the shared store that is built or attached; None if none was asked for.
    """

    config: MoEPrefetchConfig
    draft: bool = False
    store: SharedStore | None = None


_current: ContextVar[ModelLoad | None] = ContextVar("model_load", default=None)


@contextmanager
def loading(load: ModelLoad) -> Iterator[None]:
    """Within, layers are built and loaded for `load`."""
    token = _current.set(load)
    try:
        yield
    finally:
        _current.reset(token)


def current_load() -> ModelLoad | None:
    """The load that is going on, or None: layers that are built now are stock's."""
    return _current.get()
