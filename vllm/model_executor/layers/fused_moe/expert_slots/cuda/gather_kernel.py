# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Copies the experts that a step misses from the host store into their rows, in one
launch.

The kernel reads pinned host memory through its device address. So the host does not
decide what is copied, and a captured graph copies what each replay misses. The work is
divided into units, each a part of one tensor of one expert. Each program takes every
n-th unit, and ends at once if there is none for it.

The kernel must never be launched with programmatic dependent launch. The next layer
overwrites the staging rows, and stream order alone makes sure that this layer's GEMM
has read them.
"""

from collections.abc import Sequence

import torch
from vllm.triton_utils import tl, triton

LANE_BYTES = 16
"""What a thread reads at a time where rows and their addresses are multiples of it."""

UNIT_BYTES = 1 << 15
"""Bytes of a unit: enough loads in flight to cover the latency of the link."""

NARROW_BYTES = 1 << 10
"""Bytes of a unit where rows are no multiple of a lane, as those of scales and some
biases. They are copied byte by byte."""

PROGRAMS = 64
"""Programs of a launch: 64 units in flight cover the latency of any link."""


def gather_constants(units: int, all_wide: bool) -> dict[str, int]:
    """The constants of a layer's launches.

    Args:
        units: of one expert, in all of its tensors.
        all_wide: whether the rows of all tensors are made of lanes.
    """
    return {
        "UNITS": units,
        "WIDE": UNIT_BYTES // 8,
        "NARROW": 0 if all_wide else NARROW_BYTES,
        "num_warps": 8,
    }


@triton.jit
def gather_kernel(
    num_loads,  # [1] int32
    load_experts,  # [E] int32
    load_rows,  # [E] int32
    homes,  # [tensors] int64, device address of each tensor of the store
    rows,  # [tensors] int64, address of each tensor of the layer
    row_bytes,  # [tensors] int64, bytes of one expert's row
    is_wide,  # [tensors] int32, 1 if the rows are made of lanes, or 0
    unit_tensor,  # [UNITS] int32, the tensor that a unit belongs to
    unit_begin,  # [UNITS] int64, first byte of the unit within its row
    UNITS: tl.constexpr,  # units of one expert
    WIDE: tl.constexpr,  # 8-byte words of a wide unit
    NARROW: tl.constexpr,  # bytes of a narrow unit; 0 if all tensors are wide
):
    word = tl.arange(0, WIDE)
    for unit in range(tl.program_id(0), tl.load(num_loads) * UNITS, tl.num_programs(0)):
        load = unit // UNITS
        part = unit % UNITS
        expert = tl.load(load_experts + load).to(tl.int64)
        row = tl.load(load_rows + load).to(tl.int64)
        tensor = tl.load(unit_tensor + part)
        begin = tl.load(unit_begin + part)
        size = tl.load(row_bytes + tensor)
        source = tl.load(homes + tensor) + expert * size + begin
        target = tl.load(rows + tensor) + row * size + begin
        left = size - begin
        if NARROW == 0 or tl.load(is_wide + tensor) != 0:
            # A lane is two 8-byte words; neighbouring threads read neighbouring lanes.
            words = tl.multiple_of(left // 8, 2)
            home = tl.multiple_of(source.to(tl.pointer_type(tl.int64)), 16)
            here = tl.multiple_of(target.to(tl.pointer_type(tl.int64)), 16)
            tl.store(
                here + word, tl.load(home + word, mask=word < words), mask=word < words
            )
        else:
            byte = tl.arange(0, NARROW)
            home_byte = source.to(tl.pointer_type(tl.int8))
            here_byte = target.to(tl.pointer_type(tl.int8))
            copied = tl.load(home_byte + byte, mask=byte < left)
            tl.store(here_byte + byte, copied, mask=byte < left)


class Gather:
    """The loads of a layer, ready to be launched.

    Args:
        homes: device address of each tensor of the store, [E, ...].
        rows: the layer's tensors, [E, ...] each, in the same order.
    """

    def __init__(self, homes: Sequence[int], rows: Sequence[torch.Tensor]):
        sizes = [tensor[0].numel() * tensor.element_size() for tensor in rows]
        bases = [tensor.data_ptr() for tensor in rows]
        wide = [
            not (home % LANE_BYTES or base % LANE_BYTES or size % LANE_BYTES)
            for home, base, size in zip(homes, bases, sizes, strict=True)
        ]
        units = [
            (tensor, begin)
            for tensor, size in enumerate(sizes)
            for begin in range(0, size, UNIT_BYTES if wide[tensor] else NARROW_BYTES)
        ]

        def on_device(values: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=rows[0].device)

        self._arguments = (
            *(on_device(values, torch.int64) for values in (homes, bases, sizes)),
            on_device([int(w) for w in wide], torch.int32),
            on_device([tensor for tensor, _ in units], torch.int32),
            on_device([begin for _, begin in units], torch.int64),
        )
        self._constants = gather_constants(len(units), all(wide))

    def launch(
        self, num_loads: torch.Tensor, experts: torch.Tensor, rows: torch.Tensor
    ) -> None:
        """Copies experts into rows.

        Args:
            num_loads: [1] int32, how many of `experts` are copied, the first ones.
            experts: [E] int32.
            rows: [E] int32, the row of each.
        """
        gather_kernel[(PROGRAMS,)](
            num_loads, experts, rows, *self._arguments, **self._constants
        )
