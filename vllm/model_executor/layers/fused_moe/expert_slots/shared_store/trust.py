# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which files and directories are trusted: those that only this user can change.

Other users of the machine can put anything into a shared directory. So links are never
followed, and a file or directory that another user owns or can write is refused and
left as it is. The shared store and the warm start use this.
"""

import os
import stat
from pathlib import Path

from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError

_EXAMPLES = {
    "shared_store": "/dev/shm/expert-stores",
    "warm_start": "~/.cache/expert-residents",
}
"""For each option that names a directory, the directory that messages propose."""


def make_place(place: Path, option: str = "shared_store") -> None:
    """Makes the directory that `option` names, for its owner alone, or checks the one
    that is there.

    Raises:
        MoEPrefetchError: it is not a directory, or other users can change its contents.
    """
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = place.stat(follow_symlinks=False)
    except OSError as error:
        raise _refused(place, f"cannot be made: {error.strerror}", option) from None
    if not stat.S_ISDIR(status.st_mode):
        raise _refused(place, "is not a directory", option)
    # In a sticky directory like /dev/shm only its owner can rename or remove the files
    # of another user.
    sticky = bool(status.st_mode & stat.S_ISVTX)
    if status.st_uid != os.geteuid() and not (status.st_uid == 0 and sticky):
        raise _refused(place, f"belongs to user {status.st_uid}", option)
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not sticky:
        raise _refused(place, "can be written by others (chmod 700 it)", option)


def check_directory(directory: Path) -> bool:
    """Checks the directory of a store. Returns whether it is there.

    Raises:
        MoEPrefetchError: other users can access it, or it is not a directory.
    """
    try:
        status = directory.stat(follow_symlinks=False)
    except FileNotFoundError:
        return False
    own = status.st_uid == os.geteuid() and not status.st_mode & 0o077
    if not (stat.S_ISDIR(status.st_mode) and own):
        raise _refused(
            directory, "is not a directory that only this user can access (mode 0700)"
        )
    return True


def open_own(path: Path, flags: int) -> int | str:
    """Opens a regular file that only this user can access.

    Returns:
        A descriptor, or the reason why the file is refused.

    Raises:
        FileNotFoundError: there is no such file.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        return f"is not a regular file of this user: {error.strerror}"
    status = os.fstat(descriptor)
    closed = not status.st_mode & 0o077
    if not (stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and closed):
        os.close(descriptor)
        return "is not a regular file that only this user can access (mode 0600)"
    return descriptor


def open_checked(path: Path, flags: int) -> int:
    """`open_own`, with the refusal as an error. Returns a descriptor.

    Raises:
        FileNotFoundError: there is no such file.
        MoEPrefetchError: the file is refused.
    """
    opened = open_own(path, flags)
    if isinstance(opened, str):
        raise _refused(path, opened)
    return opened


def create_own(path: Path) -> int:
    """Creates a file for this user alone. Returns a descriptor to read and write it.

    Raises:
        FileExistsError: something of that name is there already.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(path, flags, 0o600)


def _refused(path: Path, reason: str, option: str = "shared_store") -> MoEPrefetchError:
    return MoEPrefetchError(
        f"--moe-gpu-prefetch-config.{option}: {path} {reason}. Name a directory of "
        f"your own, for example {_EXAMPLES[option]}."
    )
