# SPDX-License-Identifier: Apache-2.0
"""`reference.plan_step` as one Triton program: decides a layer's step on the device.

One program does the whole step, so that nothing is ordered by chance: there are no atomics, and
what one part writes to memory the next part reads behind a barrier of that one program.
"""

from vllm.triton_utils import tl, triton

IDS = 1024
"""Expert ids that the kernel looks at together."""


# What changes from step to step is no constant of the kernel: serving must not wait for a compiler.
@triton.jit(do_not_specialize=["num_ids", "waves", "bytes_per_expert"])
def plan_kernel(
    # what the step routes
    topk_ids,  # [tokens, top_k] int32
    is_padding,  # [tokens] bool; read only if HAS_PADDING
    num_ids,  # tokens * top_k
    # the layer's state
    slot_to_expert,  # [N] int32
    expert_to_slot,  # [E + 1] int32
    last_needed,  # [E] int64
    frequency,  # [E] int64
    totals,  # [9] int64, the counters in the order of TOTALS; the first, steps, is recency's clock
    mirror,  # [9] int64, the counters once more, where the host reads them
    bytes_per_expert,
    waves,  # the most that a step of this shape can take
    # what the step is told to do
    wave_tables,  # [waves, E] int32, E + 1 apart: expert -> slot in each wave, -1 = not in it
    load_experts,  # [E] int32
    load_slots,  # [E] int32
    head,  # [4] int32: needed, hits, misses, loads of the first wave
    slot_ids,  # [tokens, top_k] int32, topk_ids through the first wave's table; if ONE_WAVE
    # memory of the program's own
    flags,  # [E_PAD] int32
    order,  # [2, N_PAD] int64: values of the slots, then the victims in order
    E: tl.constexpr,
    N: tl.constexpr,
    TOP_K: tl.constexpr,
    ONE_WAVE: tl.constexpr,  # waves == 1
    WIDTH: tl.constexpr,
    RING: tl.constexpr,
    LFU: tl.constexpr,
    HALF_LIFE: tl.constexpr,
    UNIT: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    E_PAD: tl.constexpr,
    N_PAD: tl.constexpr,
    IDS: tl.constexpr,
    CHUNK: tl.constexpr,  # slots compared together
):
    e = tl.arange(0, E_PAD)
    is_expert = e < E
    s = tl.arange(0, N_PAD)
    is_slot = s < N

    # The needed set.
    tl.store(flags + e, tl.zeros([E_PAD], tl.int32))
    tl.debug_barrier()
    for begin in range(0, num_ids, IDS):
        at = begin + tl.arange(0, IDS)
        ids = tl.load(topk_ids + at, mask=at < num_ids, other=-1)
        wanted = (ids >= 0) & (ids < E)
        if HAS_PADDING:
            padding = tl.load(is_padding + at // TOP_K, mask=at < num_ids, other=1)
            wanted = wanted & (padding == 0)
        tl.store(flags + ids, tl.full([IDS], 1, tl.int32), mask=wanted)
    tl.debug_barrier()
    needed = (tl.load(flags + e, mask=is_expert, other=0) != 0) & is_expert
    slot_of = tl.load(expert_to_slot + e, mask=is_expert, other=-1)
    hit = needed & (slot_of >= 0)
    miss = needed & (slot_of < 0)
    num_needed = tl.sum(needed.to(tl.int32))
    num_hits = tl.sum(hit.to(tl.int32))
    misses = num_needed - num_hits
    first = tl.minimum(misses, N - num_hits)
    streamed = misses - first
    miss_rank = tl.cumsum(miss.to(tl.int32)) - miss.to(tl.int32)

    recency = tl.load(last_needed + e, mask=is_expert, other=0)
    step = tl.load(totals) + (num_needed > 0).to(tl.int64)
    slot = slot_of
    if misses > 0:
        # The order of victims, by the values from before this step.
        held = tl.load(slot_to_expert + s, mask=is_slot, other=0)
        value = tl.load(last_needed + held, mask=is_slot, other=0)
        if LFU:
            value += tl.load(frequency + held, mask=is_slot, other=0) << 32
        value += (tl.load(flags + held, mask=is_slot, other=0) != 0).to(tl.int64) << 61
        tl.store(order + s, value, mask=is_slot)
        tl.debug_barrier()
        rank = tl.zeros([N_PAD], tl.int32)
        for begin in range(0, N, CHUNK):
            other = begin + tl.arange(0, CHUNK)
            theirs = tl.load(order + other, mask=other < N, other=0x7FFFFFFFFFFFFFFF)
            before = (theirs[None, :] < value[:, None]) | (
                (theirs[None, :] == value[:, None]) & (other[None, :] < s[:, None])
            )
            rank += tl.sum(before.to(tl.int32), axis=1)
        victims = order + N_PAD
        tl.store(victims + rank, s.to(tl.int64), mask=is_slot)
        # Whoever loses its slot leaves the table before anybody enters it.
        leaving = is_slot & (rank < tl.maximum(first, tl.minimum(streamed, RING)))
        tl.store(expert_to_slot + held, tl.full([N_PAD], -1, tl.int32), mask=leaving)
        tl.debug_barrier()

        # Misses in ascending order: the first wave's take victims, the others go round the ring.
        streams = miss_rank >= first
        place = tl.where(streams, (miss_rank - first) % RING, miss_rank)
        slot = tl.where(miss, tl.load(victims + place, mask=miss, other=0).to(tl.int32), slot_of)
        tl.store(load_experts + miss_rank, e, mask=miss)
        tl.store(load_slots + miss_rank, slot, mask=miss)
        last_round = tl.minimum(streamed, RING)
        stays = miss & (
            (streams & (miss_rank >= misses - last_round))
            | ((miss_rank < first) & (miss_rank >= last_round))
        )
        tl.store(expert_to_slot + e, slot, mask=stays)
        tl.store(slot_to_expert + slot, e, mask=stays)

    wave_of = tl.where(miss & (miss_rank >= first), 1 + (miss_rank - first) // WIDTH, 0)
    for wave in range(waves):
        in_wave = tl.where(needed & (wave_of == wave), slot, -1)
        tl.store(wave_tables + wave * (E + 1) + e, in_wave, mask=is_expert)

    # Recency, frequency and counts; nobody reads the old ones any more.
    tl.debug_barrier()
    if num_needed > 0:
        tl.store(last_needed + e, tl.where(needed, step, recency), mask=is_expert)
        if LFU:
            count = tl.load(frequency + e, mask=is_expert, other=0)
            count = tl.where(step % HALF_LIFE == 0, count >> 1, count)
            count += needed.to(tl.int64) * UNIT
            tl.store(frequency + e, count, mask=is_expert)

        num_waves = 1 + (streamed + WIDTH - 1) // WIDTH
        i = tl.arange(0, 16)
        total = tl.load(totals + i, mask=i < 9, other=0)
        total += tl.where(i == 0, 1, 0)
        total += tl.where(i == 1, num_needed, 0)
        total += tl.where(i == 2, num_hits, 0)
        total += tl.where((i >= 3) & (i <= 5), misses, 0)
        total += tl.where(i == 6, num_waves, 0)
        total += tl.where(i == 7, (streamed > 0).to(tl.int32), 0)
        total += tl.where(i == 8, misses.to(tl.int64) * bytes_per_expert, 0)
        tl.store(totals + i, total, mask=i < 9)
        tl.store(mirror + i, total, mask=i < 9)

    i = tl.arange(0, 4)
    counts = tl.where(i == 0, num_needed, tl.where(i == 1, num_hits, misses))
    tl.store(head + i, tl.where(i == 3, first, counts))

    if ONE_WAVE:
        tl.debug_barrier()
        for begin in range(0, num_ids, IDS):
            at = begin + tl.arange(0, IDS)
            ids = tl.load(topk_ids + at, mask=at < num_ids, other=-1)
            known = (ids >= 0) & (ids < E)
            slots = tl.load(wave_tables + ids, mask=known, other=-1)
            tl.store(slot_ids + at, slots, mask=at < num_ids)
