# SPDX-License-Identifier: Apache-2.0
"""Copies the experts that a wave misses from the host store into their slots, in one launch.

The kernel reads pinned host memory through its device address: no copy engine, so no host decides
what is copied, and a captured graph copies what each replay misses. Work is dealt out in units of
`UNIT_BYTES` of one tensor of one expert; a program that finds no unit left ends.
"""

from vllm.triton_utils import tl, triton

UNIT_BYTES = 1 << 15
"""What a program copies at a time: enough loads in flight to cover the latency of the bus."""


@triton.jit(do_not_specialize=["wave"])
def gather_kernel(
    load_experts,  # [E] int32, the step's loads in order
    load_slots,  # [E] int32
    head,  # [4] int32: needed, hits, misses, loads of the first wave
    homes,  # [tensors] int64, address of each tensor of the store
    slots,  # [tensors] int64, address of each tensor of the slots
    row_lanes,  # [tensors] int64, 16-byte lanes of one expert's row
    unit_tensor,  # [UNITS] int32, which tensor a unit belongs to
    unit_lane,  # [UNITS] int64, first lane of the unit within its row
    wave,
    UNITS: tl.constexpr,  # units of one expert
    WIDTH: tl.constexpr,  # loads of a streaming wave
    LANES: tl.constexpr,  # lanes of a unit
):
    misses = tl.load(head + 2)
    first = tl.load(head + 3)
    begin = tl.where(wave == 0, 0, first + (wave - 1) * WIDTH)
    end = tl.where(wave == 0, first, tl.minimum(begin + WIDTH, misses))
    # A lane is two 8-byte words; neighbouring threads read neighbouring lanes.
    word = tl.arange(0, 2 * LANES)
    for unit in range(tl.program_id(0), (end - begin) * UNITS, tl.num_programs(0)):
        load = begin + unit // UNITS
        part = unit % UNITS
        expert = tl.load(load_experts + load).to(tl.int64)
        slot = tl.load(load_slots + load).to(tl.int64)
        tensor = tl.load(unit_tensor + part)
        lane = tl.load(unit_lane + part)
        lanes = tl.load(row_lanes + tensor)
        source = tl.load(homes + tensor) + (expert * lanes + lane) * 16
        target = tl.load(slots + tensor) + (slot * lanes + lane) * 16
        source = tl.multiple_of(source.to(tl.pointer_type(tl.int64)), 16)
        target = tl.multiple_of(target.to(tl.pointer_type(tl.int64)), 16)
        left = tl.multiple_of((lanes - lane) * 2, 2)
        words = tl.load(source + word, mask=word < left)
        tl.store(target + word, words, mask=word < left)
