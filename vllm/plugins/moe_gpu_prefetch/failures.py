# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""How a refusal of any process reaches the user in one line.

vLLM starts an engine in a process of its own, and workers below it. An error that ends
one of them is logged there with its traceback, and the process above ends with an error
without a reason. A refusal is not a bug, so the process that finds it writes the reason
into the engine's directory (`counters.py`) and exits. Each process above reads it
there, and the front end raises it.
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
    """Marks this process, which makes the engine's directory, as the one that shows
    refusals to the user."""
    global _front_end
    _front_end = os.getpid()


def in_one_line(refusal: MoEPrefetchError) -> str:
    """The line that the command prints for a refusal, like argparse's errors."""
    return f"vllm: error: {' '.join(str(refusal).split())}"


def show_refusals_in_one_line() -> None:
    """From now on a refusal that ends this process is printed as one line. Any other
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
    """What to raise for a refusal that this process found.

    The front end raises the refusal itself, and so does a process without an engine's
    directory. Any other process leaves the reason for the front end, logs it in one
    line, and raises `SystemExit`, for which vLLM logs no traceback.
    """
    path = _path()
    if path is None or _front_end == os.getpid():
        return refusal
    whole = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        whole.write_text(str(refusal), encoding="utf-8")
        whole.replace(path)
    except OSError:  # the disk is full, say: vLLM's tracebacks carry the refusal then
        return refusal
    logger.error("%s", refusal)
    _free_shared_memory()
    return SystemExit(1)


def _free_shared_memory() -> None:
    """Frees the memory that this worker's parallel groups share with other workers.
    vLLM frees it when a worker ends in order. Otherwise Python's resource tracker frees
    it and prints a warning after the refusal."""
    for group in map(lambda reference: reference(), parallel_state._groups.values()):
        if group is not None:
            group.mq_broadcaster = None


def _path() -> Path | None:
    """The file for a refusal in the engine's directory; None if there is none."""
    directory = os.environ.get(DIRECTORY_VARIABLE)
    return (
        Path(directory) / "refusal" if directory and os.path.isdir(directory) else None
    )


def _left_below() -> BaseException | None:
    """What to raise for the refusal file that a child process wrote, or None. The front
    end removes the file: a later failure must not show the same refusal."""
    path = _path()
    if path is None or not path.exists():
        return None
    if _front_end != os.getpid():
        return SystemExit(1)
    refusal = MoEPrefetchError(path.read_text(encoding="utf-8"))
    path.unlink()
    return refusal


def _telling(start: Callable[..., Any]) -> Callable[..., Any]:
    """`start`, which raises the refusal of a child process instead of its own
    error."""

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
    """The wraps of the two places that notice the end of a process: an executor sees
    its workers end, the front end its engine."""
    return (
        Wrap(Executor, "__init__", _telling(Executor.__init__)),
        Wrap(
            engine_utils,
            "wait_for_engine_startup",
            _telling(engine_utils.wait_for_engine_startup),
        ),
    )
