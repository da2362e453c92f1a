# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""How a refusal reaches the user in one line, whatever process found it.

vLLM starts an engine in a process of its own, and workers below it. What ends one of
them is logged there with its traceback, and the process above ends with an error that
names no reason. A refusal is no fault of the program: the process that finds it leaves
the reason in the engine's directory (`counters.py`) and exits; each process above takes
it from there, and the front end raises it.
"""

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm.distributed import parallel_state
from vllm.logger import init_logger
from vllm.v1.engine import utils as engine_utils
from vllm.v1.executor.abstract import Executor

from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError
from vllm.model_executor.layers.fused_moe.expert_slots.counters import (
    DIRECTORY_VARIABLE,
)
from vllm.plugins.moe_gpu_prefetch.stock.wrapping import Wrap

logger = init_logger(__name__)

_front_end: int | None = None


def this_is_the_front_end() -> None:
    """Called by the process that makes an engine's directory: refusals reach the user
    from here."""
    global _front_end
    _front_end = os.getpid()


def in_one_line(refusal: MoEPrefetchError) -> str:
    """What the command line prints of a refusal, as argparse prints an error."""
    return f"vllm: error: {' '.join(str(refusal).split())}"


def show_refusals_in_one_line() -> None:
    """From now on a refusal that ends this process is one line, the last; any other
    error keeps its traceback."""
    show = sys.excepthook
    if getattr(show, "__module__", None) == __name__:
        return

    def excepthook(kind: Any, error: BaseException, stack: Any) -> None:
        if isinstance(error, MoEPrefetchError):
            print(in_one_line(error), file=sys.stderr)
        else:
            show(kind, error, stack)

    sys.excepthook = excepthook


def ending(refusal: MoEPrefetchError) -> BaseException:
    """What to raise in this process for a refusal that it found: the refusal itself in
    the front end, and where no directory leads there. Elsewhere `SystemExit`, for which
    vLLM logs no traceback; the reason was left for the front end, and logged in one
    line."""
    path = _path()
    if path is None or _front_end == os.getpid():
        return refusal
    whole = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        whole.write_text(str(refusal), encoding="utf-8")
        whole.replace(path)
    except OSError:  # no room, say: told with vLLM's tracebacks rather than not at all
        return refusal
    logger.error("%s", refusal)
    _free_shared_memory()
    return SystemExit(1)


def _free_shared_memory() -> None:
    """Frees what the parallel groups of this worker share with others. vLLM frees it
    where a worker ends in order; otherwise Python's resource tracker does, with a
    warning after the last line."""
    for group in map(lambda reference: reference(), parallel_state._groups.values()):
        if group is not None:
            group.mq_broadcaster = None


def _path() -> Path | None:
    """Where this engine's processes leave a refusal."""
    directory = os.environ.get(DIRECTORY_VARIABLE)
    return (
        Path(directory) / "refusal" if directory and os.path.isdir(directory) else None
    )


def _left_below() -> BaseException | None:
    """What to raise for a refusal that a process below has left. The front end removes
    it, so that no later failure is taken for it."""
    path = _path()
    if path is None or not path.exists():
        return None
    if _front_end != os.getpid():
        return SystemExit(1)
    refusal = MoEPrefetchError(path.read_text(encoding="utf-8"))
    path.unlink()
    return refusal


def _telling(start: Callable[..., Any]) -> Callable[..., Any]:
    """`start`, which ends with the refusal of a process below where there was one."""

    @functools.wraps(start)
    def start_or_tell(*args: Any, **kwargs: Any) -> Any:
        try:
            return start(*args, **kwargs)
        except Exception:
            if (refusal := _left_below()) is None:
                raise
            raise refusal from None

    return start_or_tell


def wraps() -> tuple[Wrap, ...]:
    """The two places where a process learns that one below it has ended: an executor,
    of its workers; the front end, of its engine."""
    return (
        Wrap(Executor, "__init__", _telling(Executor.__init__)),
        Wrap(
            engine_utils,
            "wait_for_engine_startup",
            _telling(engine_utils.wait_for_engine_startup),
        ),
    )
