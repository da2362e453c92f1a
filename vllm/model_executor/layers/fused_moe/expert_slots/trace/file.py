# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The file of a trace: which names are accepted, and how it is created."""

import fcntl
import os
import stat
from pathlib import Path

from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError
from vllm.model_executor.layers.fused_moe.expert_slots.shared_store.trust import (
    create_own,
)
from vllm.model_executor.layers.fused_moe.expert_slots.trace import format


def trace_path(file: str, rank: int) -> Path:
    """The file of a rank: the first has the name that the user gave."""
    return Path(f"{file}.rank{rank}" if rank else file)


def check_trace_file(path: Path) -> None:
    """Refuses a name under which no trace can be written.

    Raises:
        MoEPrefetchError: the message says why, and what to do.
    """
    try:
        reason = _objection(path)
    except OSError as error:
        reason = f"cannot be used: {error.strerror}"
    if reason:
        raise MoEPrefetchError(
            f"--moe-gpu-prefetch-config.trace: {path} {reason}. Name a new file in a "
            "directory of your own."
        )


def _objection(path: Path) -> str | None:
    """
    Raises:
        OSError: the operating system does not let us look.
    """
    if not path.parent.is_dir():
        return "is in a directory that does not exist"
    if not os.access(path.parent, os.W_OK | os.X_OK):
        return "is in a directory that this user cannot write"
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
        return "is not a regular file of this user"
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        start = os.read(descriptor, len(format.MAGIC))
        if not format.MAGIC.startswith(start):
            return "is another file and no trace"
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "is the trace that another server records"
    finally:
        os.close(descriptor)
    return None


def create_trace(path: Path) -> int:
    """Creates a trace file for this user alone, and locks it while it is open. A trace
    with steps that is there already is kept as `NAME.previous`, in the place of an
    earlier one.

    Returns:
        A descriptor.

    Raises:
        MoEPrefetchError: as `check_trace_file`.
        OSError: the directory cannot be written.
    """
    check_trace_file(path)
    if path.exists():
        with path.open("rb") as file:
            kept = format.has_steps(file)
        if kept:
            path.replace(path.with_name(f"{path.name}.previous"))
        else:
            path.unlink()
    descriptor = create_own(path)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor
