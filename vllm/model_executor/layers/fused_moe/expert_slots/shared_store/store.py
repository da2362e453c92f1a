# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Host stores in shared memory: one copy of a checkpoint's experts for every server on
a machine, and for the next start.

A store is a directory named by its key, with the experts' bytes in one file and a
manifest that says what they are. One process builds it under another name while it
holds the key's lock, and renames it when it is complete. Its tensors are mapped
writable, as pinning needs them; `Memory.pin` then makes them read-only. A lock dies
with its holder, so that a build killed at any moment leaves nothing but a directory
that the next builder removes.
"""

import fcntl
import json
import mmap
import os
import shutil
import stat
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from blake3 import blake3
from pydantic import BaseModel, ConfigDict, ValidationError
from vllm.logger import init_logger

from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError
from vllm.model_executor.layers.fused_moe.expert_slots.weights.host_pages import (
    HostPages,
)

logger = init_logger(__name__)

FORMAT = 1
_ALIGNMENT = 1 << 16
"""Every tensor starts on a page of its own, whatever the page size."""

_DATA, _MANIFEST = "experts.bin", "manifest.json"
_BUILDING, _LOCK = ".building", ".lock"
_WAIT_S = 0.1


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StoredTensor(_Strict):
    """Where one per-expert tensor of one layer lies, and what its bytes are."""

    layer: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    digest: str

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.torch_dtype.itemsize


class Manifest(_Strict):
    """What a complete store holds: of which checkpoint, in which layout, by which
    versions."""

    format: Literal[1]
    identity: dict[str, Any]
    num_bytes: int
    tensors: list[StoredTensor]


def key_of(identity: dict[str, Any]) -> str:
    """The name of the store for `identity`."""
    text = json.dumps(identity, sort_keys=True)
    return blake3(text.encode()).hexdigest(length=16)


class SharedStore:
    """The experts of one model and rank in shared memory, while they are loaded.

    Attributes:
        ready: the store is complete: layers are mapped from it and need not be loaded.
            Otherwise this process builds it.
    """

    def __init__(
        self,
        place: Path,
        identity: dict[str, Any],
        lock: int,
        complete: "_Complete | None" = None,
    ):
        self._place, self._identity, self._lock = place, identity, lock
        self.ready = complete is not None
        self._building = place / f"{key_of(identity)}{_BUILDING}"
        self._tensors: list[StoredTensor] = []
        self._end = 0
        if complete is not None:
            self._data, self._tensors = complete.data, complete.manifest.tensors
            # Beside the loading of everything else, which takes as long.
            verifier = ThreadPoolExecutor(1, "expert-store")
            self._verification = verifier.submit(_damage, self._data, self._tensors)
            verifier.shutdown(wait=False)
        else:
            self._building.mkdir(mode=0o700)
            self._data = _create(self._building / _DATA)

    def attach(self, layer: str) -> dict[str, torch.Tensor]:
        """A layer's tensors of a complete store, [E, ...] each, on pages of their own
        that are to be made read-only. The first call waits until every byte of the
        store is verified.

        Raises:
            MoEPrefetchError: the store is damaged; it is removed when loading ends.
        """
        if (damage := self._verification.result()) is not None:
            raise MoEPrefetchError(
                f"the shared expert store {self._place / key_of(self._identity)} is "
                f"damaged: {damage}. It is removed; start again, and it is built anew."
            )
        mapped = {
            t.name: _mapped(self._data, t) for t in self._tensors if t.layer == layer
        }
        if not mapped:
            raise MoEPrefetchError(
                f"the shared store under {self._place} has no layer {layer}. Remove "
                f"it with vllm-moe-prefetch stores {self._place} --remove "
                f"{key_of(self._identity)}."
            )
        return mapped

    def add(
        self, layer: str, tensors: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Writes a layer's tensors into the store that is being built.

        Returns:
            The same tensors in the store, on pages of their own that are to be made
                read-only.

        Raises:
            MoEPrefetchError: the place is full.
        """
        mapped = {}
        for name, tensor in tensors.items():
            content = tensor.contiguous().view(torch.uint8).view(-1).numpy()
            entry = StoredTensor(
                layer=layer,
                name=name,
                dtype=str(tensor.dtype).removeprefix("torch."),
                shape=tuple(tensor.shape),
                offset=self._end,
                digest=_digest(memoryview(content)),
            )
            self._write(memoryview(content), entry.offset)
            self._end += -(-entry.num_bytes // _ALIGNMENT) * _ALIGNMENT
            os.ftruncate(self._data, self._end)
            self._tensors.append(entry)
            mapped[name] = _mapped(self._data, entry)
        return mapped

    def _write(self, content: memoryview, offset: int) -> None:
        written = 0
        try:
            while written < len(content):
                written += os.pwrite(self._data, content[written:], offset + written)
        except OSError as error:
            raise MoEPrefetchError(
                f"--moe-gpu-prefetch-config.shared_store {self._place}: "
                f"{error.strerror} after {offset + written:,} bytes. Give it more "
                "room (mount -o remount,size=..., or --shm-size in a container), or "
                "serve without a shared store."
            ) from None

    def _finish(self) -> None:
        """Makes the store visible, complete as it is."""
        manifest = Manifest(
            format=FORMAT,
            identity=self._identity,
            num_bytes=self._end,
            tensors=self._tensors,
        )
        os.fsync(self._data)
        descriptor = _create(self._building / _MANIFEST)
        with open(descriptor, "wb") as file:
            file.write(manifest.model_dump_json().encode())
            file.flush()
            os.fsync(descriptor)
        key = key_of(self._identity)
        self._building.rename(self._place / key)
        logger.info("Shared expert store %s is complete: %d bytes.", key, self._end)

    def _remove_if_damaged(self) -> None:
        if self._verification.result() is None:
            return
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # Whoever attaches it too finds the same, and the last of them removes it.
            return
        shutil.rmtree(self._place / key_of(self._identity), ignore_errors=True)

    def close(self, loaded: bool) -> None:
        """Ends loading: what was built becomes visible if everything was `loaded`, else
        nothing."""
        try:
            if self.ready:
                self._remove_if_damaged()
                return
            if loaded and self._tensors:
                self._finish()
            else:
                shutil.rmtree(self._building, ignore_errors=True)
        finally:
            os.close(self._data)
            os.close(self._lock)


@contextmanager
def shared_store(place: Path, identity: dict[str, Any]) -> Iterator[SharedStore]:
    """The store of `identity` under `place`, for the time of loading: attached if it is
    complete, else built by this process, after waiting for any other that builds it.
    What was mapped stays mapped.

    Raises:
        MoEPrefetchError: the place, or what lies there, is not this user's alone.
    """
    store = _open(place, identity)
    try:
        yield store
    except BaseException:
        store.close(loaded=False)
        raise
    store.close(loaded=True)


def present(place: Path, identity: dict[str, Any]) -> bool:
    """Whether a complete store lies there; it is not verified."""
    return (place / key_of(identity) / _MANIFEST).exists()


def _open(place: Path, identity: dict[str, Any]) -> SharedStore:
    make_place(place)
    key = key_of(identity)
    while True:
        lock = _locked(place, key, fcntl.LOCK_SH)
        found = _found(place / key, identity)
        if isinstance(found, _Complete):
            logger.info(
                "Shared expert store %s: attached, %d bytes.",
                key,
                found.manifest.num_bytes,
            )
            return SharedStore(place, identity, lock, found)
        os.close(lock)
        lock = _locked(place, key, fcntl.LOCK_EX)
        if isinstance(faster := _found(place / key, identity), _Complete):
            os.close(faster.data)  # another process built it
            os.close(lock)
            continue
        if found is not None:
            logger.warning("Shared expert store %s is rebuilt: %s.", key, found)
        for leftover in (place / key, place / f"{key}{_BUILDING}"):
            if leftover.exists():
                shutil.rmtree(leftover)
        return SharedStore(place, identity, lock)


def make_place(place: Path, option: str = "shared_store") -> None:
    """Makes the directory that `option` names, for its owner alone.

    Raises:
        MoEPrefetchError: it is no directory, or others could change what lies in it.
    """
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = place.stat(follow_symlinks=False)
    except OSError as error:
        raise _refused(place, f"cannot be made: {error.strerror}", option) from None
    if not stat.S_ISDIR(status.st_mode):
        raise _refused(place, "is not a directory", option)
    others_write = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if status.st_uid != os.geteuid() and not status.st_mode & stat.S_ISVTX:
        raise _refused(place, f"belongs to user {status.st_uid}", option)
    if others_write and not status.st_mode & stat.S_ISVTX:
        raise _refused(place, "can be written by others (chmod 700 it)", option)


_EXAMPLES = {
    "shared_store": "/dev/shm/expert-stores",
    "warm_start": "~/.cache/expert-residents",
}


def _refused(path: Path, reason: str, option: str = "shared_store") -> MoEPrefetchError:
    return MoEPrefetchError(
        f"--moe-gpu-prefetch-config.{option}: {path} {reason}. Name a directory of "
        f"your own, for example {_EXAMPLES[option]}."
    )


def _locked(place: Path, key: str, mode: int) -> int:
    """A descriptor of the key's lock file, locked; its lock ends with it or with the
    process."""
    path = place / f"{key}{_LOCK}"
    waiting = False
    while True:
        lock = _checked(path, os.O_RDWR | os.O_CREAT)
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
            # Whoever removes a store removes its lock file too: then this lock is
            # nobody's.
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


def _create(path: Path) -> int:
    return os.open(
        path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
    )


def _checked(path: Path, flags: int) -> int:
    """Opens a file that must be a plain one of this user, closed to others.

    Raises:
        MoEPrefetchError: it is not.
    """
    opened = open_own(path, flags)
    if isinstance(opened, str):
        raise _refused(path, opened)
    return opened


def open_own(path: Path, flags: int) -> int | str:
    """Opens a plain file of this user, closed to others.

    Returns:
        A descriptor, or in what the file is not that.

    Raises:
        FileNotFoundError: there is none.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        return f"is not a plain file of this user: {error.strerror}"
    status = os.fstat(descriptor)
    closed = not status.st_mode & 0o077
    if not (stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and closed):
        os.close(descriptor)
        return "is not a plain file of this user alone (mode 0600)"
    return descriptor


@dataclass
class _Complete:
    """A store that was found whole: a descriptor of its bytes, and what they should
    be."""

    data: int
    manifest: Manifest


def _found(directory: Path, identity: dict[str, Any]) -> _Complete | str | None:
    """The complete store in `directory`; why it cannot be used; None if there is none.

    Raises:
        MoEPrefetchError: it is not this user's alone.
    """
    try:
        status = directory.stat(follow_symlinks=False)
    except FileNotFoundError:
        return None
    own = status.st_uid == os.geteuid() and not status.st_mode & 0o077
    if not (stat.S_ISDIR(status.st_mode) and own):
        raise _refused(directory, "is not a directory of this user alone (mode 0700)")
    try:
        with open(_checked(directory / _MANIFEST, os.O_RDONLY), "rb") as file:
            manifest = Manifest.model_validate_json(file.read())
        if manifest.identity != identity:
            return "it holds another model"
        data = _checked(directory / _DATA, os.O_RDWR)
    except ValidationError as error:
        return f"its manifest is damaged ({error.error_count()} errors)"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    size = os.fstat(data).st_size
    if size != manifest.num_bytes or not size:
        os.close(data)
        return f"it has {size:,} bytes instead of {manifest.num_bytes:,}"
    return _Complete(data, manifest)


def _damage(data: int, tensors: list[StoredTensor]) -> str | None:
    """Which bytes are not those that were written, or None."""
    content = memoryview(mmap.mmap(data, 0, prot=mmap.PROT_READ))
    for tensor in tensors:
        if (
            _digest(content[tensor.offset : tensor.offset + tensor.num_bytes])
            != tensor.digest
        ):
            return f"the bytes of {tensor.layer}.{tensor.name} are not those written"
    return None


def _mapped(data: int, tensor: StoredTensor) -> torch.Tensor:
    pages = HostPages.of_file(data, tensor.num_bytes, tensor.offset)
    return pages.tensor(tensor.torch_dtype, tensor.shape)


def _digest(content: memoryview) -> str:
    return blake3(max_threads=blake3.AUTO).update(content).hexdigest()


class StoreListing(_Strict):
    """A store as `vllm-moe-prefetch stores` shows it."""

    key: str
    state: Literal["complete", "unfinished", "in use"]
    num_bytes: int
    model: str


def stores(place: Path) -> list[StoreListing]:
    """The stores under `place`, complete ones and what killed builds left."""
    make_place(place)
    listings = []
    for path in sorted(place.iterdir()):
        key = path.name.removesuffix(_BUILDING)
        if not _is_key(key) or path.is_symlink() or not path.is_dir():
            continue
        state, model = "complete", "?"
        try:
            identity = Manifest.model_validate_json(
                (path / _MANIFEST).read_bytes()
            ).identity
            model = str(identity.get("model", "?"))
        except (OSError, ValidationError):
            state = "unfinished"
        with _nobody_else(place, key) as alone:
            if not alone:
                state = "in use"
        data = path / _DATA
        num_bytes = data.stat().st_size if data.exists() else 0
        listings.append(
            StoreListing(key=key, state=state, num_bytes=num_bytes, model=model)  # type: ignore[arg-type]
        )
    return listings


def remove(place: Path, keys: Sequence[str]) -> list[str]:
    """Removes stores, or all if `keys` is empty. Servers that have mapped one keep it.

    Returns:
        The keys that were removed; the others are being built or attached right now.
    """
    make_place(place)
    wanted = set(keys) or {
        name
        for path in place.iterdir()
        if _is_key(name := path.name.removesuffix(_BUILDING).removesuffix(_LOCK))
    }
    removed = []
    for key in sorted(wanted):
        if not _is_key(key):
            raise MoEPrefetchError(f"{key!r} is not the key of a store under {place}")
        with _nobody_else(place, key) as alone:
            if alone:
                shutil.rmtree(place / key, ignore_errors=True)
                shutil.rmtree(place / f"{key}{_BUILDING}", ignore_errors=True)
                (place / f"{key}{_LOCK}").unlink(missing_ok=True)
                removed.append(key)
    return removed


def _is_key(name: str) -> bool:
    return len(name) == 32 and all(
        character in "0123456789abcdef" for character in name
    )


@contextmanager
def _nobody_else(place: Path, key: str) -> Iterator[bool]:
    """Whether nobody builds or attaches this store; nobody can while this lasts."""
    lock = _checked(place / f"{key}{_LOCK}", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
    else:
        yield True
    finally:
        os.close(lock)


_current: SharedStore | None = None


@contextmanager
def loading_into(store: SharedStore | None) -> Iterator[None]:
    """Within, layers that are built and loaded use `store`."""
    global _current
    before, _current = _current, store
    try:
        yield
    finally:
        _current = before


def current() -> SharedStore | None:
    """The store that the model being loaded uses, if any."""
    return _current
