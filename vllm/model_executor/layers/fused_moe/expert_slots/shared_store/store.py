# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Host stores in shared memory: one copy of a checkpoint's experts for every server on
a machine, and for the next start.

A store is a directory named by its key. One process builds it under another name while
it holds the key's lock, and renames it when it is complete. So a build that is killed
at any moment leaves nothing but a directory, which the next builder removes. Tensors
are mapped writable, because pinning needs that; `Memory.pin` then makes them read-only.
"""

import fcntl
import mmap
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from vllm.logger import init_logger

from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError
from vllm.model_executor.layers.fused_moe.expert_slots.shared_store.format import (
    ALIGNMENT,
    BUILDING,
    DATA,
    MANIFEST,
    Manifest,
    StoredTensor,
    digest,
    key_of,
)
from vllm.model_executor.layers.fused_moe.expert_slots.shared_store.locks import locked
from vllm.model_executor.layers.fused_moe.expert_slots.shared_store.trust import (
    check_directory,
    create_own,
    make_place,
    open_checked,
)
from vllm.model_executor.layers.fused_moe.expert_slots.weights.host_pages import (
    HostPages,
)

logger = init_logger(__name__)


@dataclass
class _Complete:
    """A store that was found complete: a descriptor of its data, and its manifest."""

    data: int
    manifest: Manifest


class SharedStore:
    """The experts of one model and rank in shared memory, while they are loaded.

    Attributes:
        ready: whether the store is complete. If so, layers are mapped from it and the
            checkpoint's experts are not loaded. Otherwise this process builds it.
    """

    def __init__(
        self,
        place: Path,
        identity: dict[str, Any],
        lock: int,
        complete: _Complete | None = None,
    ):
        self._place, self._identity, self._lock = place, identity, lock
        self.ready = complete is not None
        self._building = place / f"{key_of(identity)}{BUILDING}"
        self._tensors: list[StoredTensor] = []
        self._end = 0
        if complete is not None:
            self._data, self._tensors = complete.data, complete.manifest.tensors
            # Verified while everything else is loaded, which takes as long.
            verifier = ThreadPoolExecutor(1, "expert-store")
            self._verification = verifier.submit(_damage, self._data, self._tensors)
            verifier.shutdown(wait=False)
        else:
            self._building.mkdir(mode=0o700)
            self._data = create_own(self._building / DATA)

    def attach(self, layer: str) -> dict[str, torch.Tensor]:
        """Maps a layer's tensors from a complete store. The first call waits until
        every byte of the store is verified.

        Returns:
            The tensors by name, [E, ...] each, on pages of their own in host memory.
                The caller makes them read-only.

        Raises:
            MoEPrefetchError: the store is damaged, and is removed when loading ends; or
                it does not have the layer.
        """
        if (damage := self._verification.result()) is not None:
            raise MoEPrefetchError(
                f"the shared expert store {self._place / key_of(self._identity)} is "
                f"damaged: {damage}. The store is removed now; start again to rebuild "
                "it."
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
        """Writes a layer's tensors into the store that this process builds.

        Returns:
            The same tensors, mapped from the store as `attach` maps them.

        Raises:
            MoEPrefetchError: the file system is full.
        """
        mapped = {}
        for name, tensor in tensors.items():
            flat = tensor.cpu().contiguous().view(-1).view(torch.uint8)
            content = flat.numpy().data
            entry = StoredTensor(
                layer=layer,
                name=name,
                dtype=str(tensor.dtype).removeprefix("torch."),
                shape=tuple(tensor.shape),
                offset=self._end,
                digest=digest(content),
            )
            self._write(content, entry.offset)
            self._end += -(-entry.num_bytes // ALIGNMENT) * ALIGNMENT
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
        """Writes the manifest and gives the store its name, which makes it visible."""
        manifest = Manifest(
            format=1,
            identity=self._identity,
            num_bytes=self._end,
            tensors=self._tensors,
        )
        os.fsync(self._data)
        descriptor = create_own(self._building / MANIFEST)
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
            # Another process has attached the store too. It finds the same damage, and
            # the last one removes the store.
            return
        shutil.rmtree(self._place / key_of(self._identity), ignore_errors=True)

    def close(self, loaded: bool) -> None:
        """Ends loading. A store that this process built becomes visible if everything
        was `loaded`, and is removed if not."""
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
    """The store of `identity` under `place`, for the time of loading.

    A complete store is attached. Otherwise this process builds it; if another process
    is building it, this one waits and then attaches. What was mapped stays mapped after
    the context has ended.

    Raises:
        MoEPrefetchError: other users can change the place or what lies there.
    """
    store = _open(place, identity)
    try:
        yield store
    except BaseException:
        store.close(loaded=False)
        raise
    store.close(loaded=True)


def _open(place: Path, identity: dict[str, Any]) -> SharedStore:
    make_place(place)
    key = key_of(identity)
    while True:
        lock = locked(place, key, fcntl.LOCK_SH)
        found = _found(place / key, identity)
        if isinstance(found, _Complete):
            size = found.manifest.num_bytes
            logger.info("Shared expert store %s: attached, %d bytes.", key, size)
            return SharedStore(place, identity, lock, found)
        os.close(lock)
        lock = locked(place, key, fcntl.LOCK_EX)
        if isinstance(faster := _found(place / key, identity), _Complete):
            os.close(faster.data)  # another process has built it meanwhile
            os.close(lock)
            continue
        if found is not None:
            logger.warning("Shared expert store %s is rebuilt: %s.", key, found)
        for leftover in (place / key, place / f"{key}{BUILDING}"):
            if leftover.exists():
                shutil.rmtree(leftover)
        return SharedStore(place, identity, lock)


def _found(directory: Path, identity: dict[str, Any]) -> _Complete | str | None:
    """The complete store in `directory`; or why it cannot be used; or None if there is
    none.

    Raises:
        MoEPrefetchError: other users can access it.
    """
    if not check_directory(directory):
        return None
    try:
        with open(open_checked(directory / MANIFEST, os.O_RDONLY), "rb") as file:
            manifest = Manifest.model_validate_json(file.read())
        if manifest.identity != identity:
            return "it holds another model"
        data = open_checked(directory / DATA, os.O_RDWR)
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
    """The first tensor whose bytes changed since they were written, in words; or
    None."""
    content = memoryview(mmap.mmap(data, 0, prot=mmap.PROT_READ))
    for tensor in tensors:
        stored = content[tensor.offset : tensor.offset + tensor.num_bytes]
        if digest(stored) != tensor.digest:
            return (
                f"the bytes of {tensor.layer}.{tensor.name} have changed since they "
                "were written"
            )
    return None


def _mapped(data: int, tensor: StoredTensor) -> torch.Tensor:
    pages = HostPages.of_file(data, tensor.num_bytes, tensor.offset)
    return pages.tensor(tensor.torch_dtype, tensor.shape)
