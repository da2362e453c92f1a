# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Every name of vLLM that this feature wraps, replaces or relies on, and whether the
installed vLLM has it. The names are in `table/`, a file for each area. A test resolves
them against the installed vLLM, so an upgrade fails there, with the seam's name."""

import importlib
import inspect
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any

from packaging.version import Version

from vllm.plugins.moe_gpu_prefetch.stock.seam import SUPPORTED, Seam
from vllm.plugins.moe_gpu_prefetch.stock.table.capacity import CAPACITY
from vllm.plugins.moe_gpu_prefetch.stock.table.command import COMMAND
from vllm.plugins.moe_gpu_prefetch.stock.table.layers import LAYERS
from vllm.plugins.moe_gpu_prefetch.stock.table.loading import LOADING
from vllm.plugins.moe_gpu_prefetch.stock.table.start import START
from vllm.plugins.moe_gpu_prefetch.stock.table.worker import WORKER

SEAMS: tuple[Seam, ...] = (*START, *LOADING, *LAYERS, *WORKER, *CAPACITY, *COMMAND)


def resolve(target: str) -> Any:
    """The object that a seam names; for a field or an attribute set in `__init__`, its
    class.

    Raises:
        AttributeError, ImportError: it is not there.
    """
    module, _, qualname = target.partition(":")
    value = importlib.import_module(module)
    for name in qualname.split("."):
        if is_dataclass(value) and name in {field.name for field in fields(value)}:
            return value
        if inspect.isclass(value) and not hasattr(value, name):
            if f"self.{name}" not in inspect.getsource(value):
                raise AttributeError(f"{value.__name__} has no {name}")
            return value
        value = getattr(value, name)
    return value


def missing(seam: Seam) -> str | None:
    """What the installed vLLM lacks of a seam, as a sentence without its full stop; or
    None."""
    try:
        value = resolve(seam.target)
        parameters = inspect.signature(value).parameters if seam.parameters else {}
    except (AttributeError, ImportError, TypeError, ValueError) as error:
        return f"{seam.target} cannot be used ({error})"
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return None
    lost = [name for name in seam.parameters if name not in parameters]
    return f"{seam.target} no longer accepts {', '.join(lost)}" if lost else None


@cache
def first_broken(at_start: bool = False) -> str | None:
    """Why slots cannot run on this vLLM although its version is supported, or None.

    Args:
        at_start: look only at what is wrapped in all processes, with the flag and
            without it.
    """
    import vllm

    for seam in SEAMS:
        if seam.deferred or (at_start and seam.kind != "wrapped"):
            continue
        if seam.applies_to(vllm.__version__) and (lack := missing(seam)):
            return not_as_known(lack)
    return None


def require(target: str) -> None:
    """Checks a deferred seam, where it is applied.

    Raises:
        MoEPrefetchError: the installed vLLM lacks it.
    """
    from vllm.model_executor.layers.fused_moe.expert_slots.config import (
        MoEPrefetchError,
    )

    (seam,) = [seam for seam in SEAMS if seam.target == target]
    if lack := missing(seam):
        raise MoEPrefetchError(not_as_known(lack))


def not_as_known(difference: str) -> str:
    """Why slots cannot run on a vLLM that has been changed."""
    import vllm

    return (
        f"this vLLM {vllm.__version__} differs from the released one: {difference}. "
        f"Install a released vLLM {SUPPORTED}, disable the plugin that changed it with "
        "VLLM_PLUGINS, or serve without --moe-gpu-prefetch."
    )


def unsupported_version() -> str | None:
    """Why the installed vLLM is outside the supported range, or None."""
    import vllm

    if SUPPORTED.contains(Version(vllm.__version__)):
        return None
    return (
        f"expert slots support vLLM {SUPPORTED}, and {vllm.__version__} is installed. "
        "Install a supported vLLM, or serve without --moe-gpu-prefetch."
    )
