# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which stores lie in a directory, and how they are removed."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError
from vllm.model_executor.layers.fused_moe.expert_slots.shared_store.format import (
    BUILDING,
    DATA,
    LOCK,
    MANIFEST,
    Manifest,
    Strict,
    is_key,
    key_of,
)
from vllm.model_executor.layers.fused_moe.expert_slots.shared_store.locks import unused
from vllm.model_executor.layers.fused_moe.expert_slots.shared_store.trust import (
    make_place,
)


class StoreListing(Strict):
    """A store as `vllm-moe-prefetch stores` shows it."""

    key: str
    state: Literal["complete", "unfinished", "in use"]
    num_bytes: int
    model: str


def present(place: Path, identity: dict[str, Any]) -> bool:
    """Whether a complete store of `identity` lies under `place`. Its bytes are not
    verified."""
    return (place / key_of(identity) / MANIFEST).exists()


def stores(place: Path) -> list[StoreListing]:
    """The stores under `place`: complete ones, and the remains of killed builds.

    Raises:
        MoEPrefetchError: other users can change what lies there.
    """
    make_place(place)
    listings = []
    for path in sorted(place.iterdir()):
        key = path.name.removesuffix(BUILDING)
        if not is_key(key) or path.is_symlink() or not path.is_dir():
            continue
        state, model = "complete", "?"
        try:
            content = (path / MANIFEST).read_bytes()
            identity = Manifest.model_validate_json(content).identity
            model = str(identity.get("model", "?"))
        except (OSError, ValidationError):
            state = "unfinished"
        with unused(place, key) as alone:
            if not alone:
                state = "in use"
        data = path / DATA
        num_bytes = data.stat().st_size if data.exists() else 0
        listings.append(
            StoreListing(key=key, state=state, num_bytes=num_bytes, model=model)  # type: ignore[arg-type]
        )
    return listings


def remove(place: Path, keys: Sequence[str]) -> list[str]:
    """Removes stores, or all if `keys` is empty. Servers that have mapped a store keep
    its memory.

    Returns:
        The keys that were removed. The others are being built or attached now.

    Raises:
        MoEPrefetchError: a key has not the form of one, or other users can change what
            lies in `place`.
    """
    make_place(place)
    wanted = set(keys) or {
        name
        for path in place.iterdir()
        if is_key(name := path.name.removesuffix(BUILDING).removesuffix(LOCK))
    }
    removed = []
    for key in sorted(wanted):
        if not is_key(key):
            raise MoEPrefetchError(f"{key!r} is not the key of a store under {place}")
        with unused(place, key) as alone:
            if alone:
                shutil.rmtree(place / key, ignore_errors=True)
                shutil.rmtree(place / f"{key}{BUILDING}", ignore_errors=True)
                (place / f"{key}{LOCK}").unlink(missing_ok=True)
                removed.append(key)
    return removed
