# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What lies in the directory of a shared store: names, manifest and digests.

KEY/experts.bin      the experts' bytes, each tensor at a multiple of `ALIGNMENT`
KEY/manifest.json    `Manifest`
KEY.building/        the same while it is being built
KEY.lock             see `locks.py`
"""

import json
from typing import Any, Literal

import torch
from blake3 import blake3
from pydantic import BaseModel, ConfigDict

ALIGNMENT = 1 << 16
"""Every tensor starts on a page of its own, whatever the page size."""

DATA, MANIFEST = "experts.bin", "manifest.json"
BUILDING, LOCK = ".building", ".lock"


class Strict(BaseModel):
    """A model that rejects unknown fields and cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class StoredTensor(Strict):
    """Where one per-expert tensor of one layer lies in the data file, and the digest of
    its bytes."""

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


class Manifest(Strict):
    """What a complete store holds: its identity (checkpoint, layout, versions), its
    size and its tensors."""

    format: Literal[1]
    identity: dict[str, Any]
    num_bytes: int
    tensors: list[StoredTensor]


def key_of(identity: dict[str, Any]) -> str:
    """The name of the store for `identity`: 32 hexadecimal digits. The warm start names
    its files by the same digits."""
    text = json.dumps(identity, sort_keys=True)
    return blake3(text.encode()).hexdigest(length=16)


def is_key(name: str) -> bool:
    """Whether `name` has the form of a key."""
    return len(name) == 32 and all(
        character in "0123456789abcdef" for character in name
    )


def digest(content: memoryview) -> str:
    """The digest of a tensor's bytes, computed by all cores."""
    return blake3(max_threads=blake3.AUTO).update(content).hexdigest()
