# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The format of a trace file, version 1.

The file begins with `MAGIC`. Behind it are frames: the kind (a byte), the layer's
number, the count of steps, the number of the first step, the length of the content, the
content, and the CRC-32 of all that. A file that was cut off ends in an incomplete
frame, which a reader leaves out. Integers are little-endian. The kinds:

* H: `Header` as JSON; the first frame.
* S: consecutive steps of a layer, compressed by zlib: rows [n] uint32, then sets
  [n, ceil(E / 8)] uint8, a bit for each expert, the lowest first.
* T: `State` as JSON, compressed by zlib.
* E: `End` as JSON; the last frame.
"""

import os
import struct
import zlib
from collections.abc import Iterator
from typing import Annotated, BinaryIO, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

MAGIC = b"vllm-moe-trace 1\n"
HEADER, STEPS, STATE, END = b"HSTE"[0], b"HSTE"[1], b"HSTE"[2], b"HSTE"[3]

_HEAD = struct.Struct("<BHIQI")
_CRC = struct.Struct("<I")
MAX_CONTENT = 1 << 26
"""Bytes of a frame's content, at most, also unpacked. A longer one is damage."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


_Count = Annotated[int, Field(ge=1, lt=1 << 31)]
_Expert = Annotated[int, Field(ge=0, lt=1 << 15)]


class LayerHeader(_Strict):
    """A layer's constants, and what its slots began with."""

    name: str
    num_experts: Annotated[int, Field(ge=1, lt=1 << 15)]
    num_slots: _Count
    top_k: _Count
    routed: Annotated[float, Field(gt=0)]
    bytes_per_expert: Annotated[int, Field(ge=1, lt=1 << 62)]
    policy: Literal["lru", "lfu"]
    lfu_half_life: _Count
    experts: list[_Expert] | None = None
    counts: list[int] | None = None


class Header(_Strict):
    """What was recorded."""

    model: str
    rank: Annotated[int, Field(ge=0)]
    platform: str
    vllm: str
    max_num_seqs: _Count
    link: float | None
    kv_bytes_per_token: float | None
    layers: list[LayerHeader]


class State(_Strict):
    """The engine's own counters after the steps recorded so far, by layer, and the
    seconds in which it made them."""

    busy_seconds: float
    totals: dict[str, dict[str, int]]


class End(_Strict):
    """Why the recording ended."""

    reason: Literal["closed", "limit"]


def frame(
    kind: int, content: bytes, layer: int = 0, count: int = 0, first: int = 0
) -> bytes:
    """The bytes of a frame."""
    head = _HEAD.pack(kind, layer, count, first, len(content))
    return head + content + _CRC.pack(zlib.crc32(head + content))


def has_steps(file: BinaryIO) -> bool:
    """Whether a trace has steps: their first frame follows the header."""
    file.seek(len(MAGIC))
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return False
    file.seek(_HEAD.unpack(head)[4] + _CRC.size, os.SEEK_CUR)
    return file.read(1) == bytes([STEPS])


def frames(data: memoryview) -> Iterator[tuple[int, int, int, int, bytes]]:
    """The whole frames of a file behind `MAGIC`: kind, layer, count, first, content. It
    ends at the first that is cut off, or was never written and is zeroes.

    Raises:
        ValueError: a frame is damaged.
    """
    at = 0
    while at + _HEAD.size <= len(data):
        kind, layer, count, first, length = _HEAD.unpack_from(data, at)
        end = at + _HEAD.size + length
        if kind == 0:
            return
        if length > MAX_CONTENT:
            raise ValueError(f"the frame at byte {at + len(MAGIC):,} is damaged")
        if end + _CRC.size > len(data):
            return
        (crc,) = _CRC.unpack_from(data, end)
        if crc != zlib.crc32(data[at:end]):
            raise ValueError(f"the frame at byte {at + len(MAGIC):,} is damaged")
        yield kind, layer, count, first, bytes(data[at + _HEAD.size : end])
        at = end + _CRC.size


def unpack(content: bytes) -> bytes:
    """What was compressed.

    Raises:
        ValueError: it is too long, or damaged.
    """
    unpacker = zlib.decompressobj()
    try:
        data = unpacker.decompress(content, MAX_CONTENT)
    except zlib.error as error:
        raise ValueError(f"it is damaged ({error})") from None
    if not unpacker.eof:
        raise ValueError("it is damaged (a frame is too long)")
    return data


def pack_steps(rows: np.ndarray, sets: np.ndarray) -> bytes:
    """The content of a frame of steps.

    Args:
        rows: [n] integers.
        sets: [n, ceil(E / 8)] uint8.
    """
    return zlib.compress(rows.astype("<u4").tobytes() + sets.tobytes(), 6)


def unpack_steps(
    content: bytes, count: int, num_experts: int
) -> tuple[np.ndarray, np.ndarray]:
    """The rows [n] int64 and the needed experts [n, E] bool of a frame of steps.

    Raises:
        ValueError: the content has another length.
    """
    width = -(-num_experts // 8)
    data = unpack(content)
    if count == 0 or len(data) != count * (4 + width):
        raise ValueError(f"{count} steps do not fit their frame")
    rows = np.frombuffer(data, "<u4", count).astype(np.int64)
    sets = np.frombuffer(data, np.uint8, offset=4 * count).reshape(count, width)
    return rows, np.unpackbits(
        sets, axis=1, count=num_experts, bitorder="little"
    ).astype(bool)
