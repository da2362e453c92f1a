# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Puts our layer classes into vLLM's out-of-tree registry while a slotted model is
built. Until then the names are free for other plugins: vLLM lets each name be
registered once."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain

from vllm.model_executor.custom_op import PluggableLayer, op_registry_oot

from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError

_OURS = (
    "vllm.plugins.moe_gpu_prefetch",
    "vllm.model_executor.layers.fused_moe.expert_slots",
)
_REPLACED = ("RoutedExperts", "MoERunner")


def held_by_another(names: tuple[str, ...] = _REPLACED) -> str | None:
    """The first of `names` that another plugin has registered, as `name by class`."""
    for name in names:
        holder = op_registry_oot.get(name)
        if holder is not None and not holder.__module__.startswith(_OURS):
            return f"{name} by {holder.__module__}.{holder.__qualname__}"
    return None


def replaced(what: str) -> str:
    """Why slots cannot work where another plugin has replaced a layer class."""
    return (
        f"another plugin replaced {what}, so vLLM would not build expert slots. "
        "Disable one of the two with VLLM_PLUGINS, or serve without "
        "--moe-gpu-prefetch."
    )


@contextmanager
def in_place() -> Iterator[None]:
    """Within, stock builds our classes instead of `RoutedExperts`, `MoERunner` and the
    classes derived from them: those that are defined already, and those whose module is
    imported while the model is built."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    with ExitStack() as stack:
        for base in (RoutedExperts, MoERunner):
            for cls in _family(base):
                _replace(cls)
            stack.enter_context(_replacing_subclasses(base))
        yield


def _family(base: type) -> list[type]:
    children: list[type] = base.__subclasses__()
    return [base, *chain.from_iterable(map(_family, children))]


def _replace(stock: type) -> None:
    """Registers ours under the name of the layer class `stock`; idempotent.

    Raises:
        MoEPrefetchError: another plugin holds the name.
    """
    from vllm.model_executor.layers.fused_moe.expert_slots.layer import slotted_class

    if stock.__module__.startswith(_OURS):
        return
    if taken := held_by_another((stock.__name__,)):
        raise MoEPrefetchError(replaced(taken))
    ours = op_registry_oot.get(stock.__name__)
    if ours is None:
        PluggableLayer.register_oot(slotted_class(stock), name=stock.__name__)
    elif not issubclass(ours, stock):
        raise MoEPrefetchError(
            f"--moe-gpu-prefetch: {stock.__module__} and {ours.__mro__[2].__module__} "
            f"both define a layer class {stock.__name__}, and vLLM's registry has room "
            "for one. Serve without --moe-gpu-prefetch."
        )


@contextmanager
def _replacing_subclasses(base: type) -> Iterator[None]:
    """Within, a class that is derived from `base` is replaced as soon as it is
    defined."""

    def __init_subclass__(cls: type, **kwargs: object) -> None:
        super(base, cls).__init_subclass__(**kwargs)  # type: ignore[misc, arg-type]
        _replace(cls)

    base.__init_subclass__ = classmethod(__init_subclass__)  # type: ignore[assignment]
    try:
        yield
    finally:
        del base.__init_subclass__
