# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The lock of a store: `flock` on the file `KEY.lock`.

It is held exclusively while the store is built or removed, and shared while a server
attaches the store. It ends with its descriptor or with its process, so a killed process
leaves no lock behind.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vllm.logger import init_logger

from vllm.model_executor.layers.fused_moe.expert_slots.shared_store.format import LOCK
from vllm.model_executor.layers.fused_moe.expert_slots.shared_store.trust import (
    open_checked,
)

logger = init_logger(__name__)

_WAIT_S = 0.1
"""Seconds between two attempts to take a lock that another process holds."""


def locked(place: Path, key: str, mode: int) -> int:
    """Waits for the lock of a store. Returns the descriptor that holds it.

    Args:
        mode: `fcntl.LOCK_SH` or `fcntl.LOCK_EX`.

    Raises:
        MoEPrefetchError: other users can access the lock file.
    """
    path = place / f"{key}{LOCK}"
    waiting = False
    while True:
        lock = open_checked(path, os.O_RDWR | os.O_CREAT)
        try:
            while True:
                try:
                    fcntl.flock(lock, mode | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if not waiting:
                        logger.info(
                            "Waiting for the process that builds expert store %s.", key
                        )
                        waiting = True
                    time.sleep(_WAIT_S)
            # Removing a store removes its lock file too. A lock on a removed file
            # excludes no other process, so the file is opened again.
            if _same_file(lock, path):
                return lock
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat(follow_symlinks=False))
    except FileNotFoundError:
        return False


@contextmanager
def unused(place: Path, key: str) -> Iterator[bool]:
    """Whether no other process builds or attaches this store. If so, none can start to
    within the context.

    Raises:
        MoEPrefetchError: other users can access the lock file.
    """
    lock = open_checked(place / f"{key}{LOCK}", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
    else:
        yield True
    finally:
        os.close(lock)
