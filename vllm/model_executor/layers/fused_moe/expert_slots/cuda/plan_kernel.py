# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""`decisions.step.plan_step` as one Triton program, which decides a layer's step on the
device.

The launch has one program, without atomics, so nothing is ordered by chance: what one
part of the program writes to memory, the next part reads behind a barrier. If every
needed expert is resident, the program ends after one reduction and one barrier.
"""

from vllm.triton_utils import tl, triton

from vllm.model_executor.layers.fused_moe.expert_slots.counters import TOTALS
from vllm.model_executor.layers.fused_moe.expert_slots.decisions.policy import (
    FREQUENCY_UNIT,
)
from vllm.model_executor.layers.fused_moe.expert_slots.trace.ring import (
    HEAD,
    RECORDS,
    words_of,
)

FEW_IDS = 128
"""Up to so many expert ids are compared with the experts in registers, without flags in
memory."""

IDS = 1024
"""Expert ids that the program reads together."""

_NEVER = tl.constexpr(0x7FFFFFFFFFFFFFFF)
"""The key of what takes no part in a ranking. It comes behind all other keys."""

_RECORDS, _HEAD = tl.constexpr(RECORDS), tl.constexpr(HEAD)

_NUM_TOTALS = tl.constexpr(len(TOTALS))
_TOTALS_PAD = tl.constexpr(1 << (len(TOTALS) - 1).bit_length())
"""A counter is added to `TOTALS`, to these names and where `total` is summed up."""

(
    _STEPS,
    _NEEDED,
    _HITS,
    _MISSES,
    _LOADS,
    _STAGED,
    _EVICTIONS,
    _STAGED_STEPS,
    _OVERFLOWS,
    _BYTES,
) = (
    tl.constexpr([*TOTALS].index(name))
    for name in (
        "steps",
        "needed",
        "hits",
        "misses",
        "loads",
        "staged",
        "evictions",
        "staged_steps",
        "overflow_steps",
        "bytes_loaded",
    )
)


def plan_constants(
    num_experts: int, num_slots: int, policy: str, lfu_half_life: int, traced: bool
) -> dict[str, int | bool]:
    """The constants of a layer's launches."""
    experts, slots = (
        triton.next_power_of_2(count) for count in (num_experts, num_slots)
    )
    num_warps = 4 if experts <= 128 else 8
    together = 1024 * num_warps  # keys compared with each other: 32 a thread
    return {
        "E": num_experts,
        "N": num_slots,
        "LFU": policy == "lfu",
        "HALF_LIFE": lfu_half_life,
        "UNIT": FREQUENCY_UNIT,
        "TRACED": traced,
        "WORDS": words_of(num_experts),
        "LANES": min(32, experts),
        "E_PAD": experts,
        "N_PAD": slots,
        "FEW_IDS": FEW_IDS,
        "IDS": IDS,
        "CHUNK": min(experts, together // experts),
        "SLOT_CHUNK": min(slots, together // slots),
        "num_warps": num_warps,
    }


@triton.jit
def _wanted(
    topk_ids,
    is_padding,
    expert_map,
    num_ids,
    num_ids_known,
    at,
    TOP_K: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    HAS_MAP: tl.constexpr,
):
    """This rank's expert for each of the ids number `at`, or -1 if it needs none."""
    ids = tl.load(topk_ids + at, mask=at < num_ids, other=-1).to(tl.int32)
    ids = tl.where(ids < num_ids_known, ids, -1)
    if HAS_PADDING:
        padding = tl.load(is_padding + at // TOP_K, mask=at < num_ids, other=1)
        ids = tl.where(padding == 0, ids, -1)
    if HAS_MAP:
        ids = tl.load(expert_map + ids, mask=ids >= 0, other=-1).to(tl.int32)
    return ids


@triton.jit
def _rank(key, tie, COUNT: tl.constexpr, CHUNK: tl.constexpr):
    """Rank of each of COUNT keys, ascending; among equals the lower `tie` is first."""
    rank = tl.zeros([COUNT], tl.int32)
    for begin in range(0, COUNT, CHUNK):
        other = begin + tl.arange(0, CHUNK)
        theirs = tl.gather(key, other, 0)[:, None]
        before = (theirs < key[None, :]) | (
            (theirs == key[None, :])
            & (tl.gather(tie, other, 0)[:, None] < tie[None, :])
        )
        rank += tl.sum(before.to(tl.int32), axis=0)
    return rank


# The arguments that change from step to step do not specialise the kernel: serving must
# not wait for a compiler.
@triton.jit(do_not_specialize=["num_ids", "num_ids_known", "bytes_per_expert"])
def plan_kernel(
    # what the step routes
    topk_ids,  # [tokens, top_k] int32 or int64
    is_padding,  # [tokens] bool; read only if HAS_PADDING
    expert_map,  # [num_ids_known] int32, id -> this rank's expert or -1; if HAS_MAP
    num_ids,  # tokens * top_k
    num_ids_known,  # experts of the model; E if there is no map
    # the layer's state
    slot_to_expert,  # [N] int32
    expert_to_slot,  # [E] int32
    expert_to_row,  # [E] int32
    last_needed,  # [E] int64
    frequency,  # [E] int64
    totals,  # [totals] int64 in the order of TOTALS; "steps" is the clock of recency
    mirror,  # address of [totals] int64, a copy that the host reads
    ring,  # address of [RECORDS, HEAD + WORDS] int32 of a `TraceRing`; if TRACED
    bytes_per_expert,  # of all its tensors; a load adds so many to bytes_loaded
    # outputs: loads, and the row of each id
    num_loads,  # [1] int32
    load_experts,  # [E] int32
    load_rows,  # [E] int32
    rows,  # [tokens, top_k] like topk_ids; [num_ids_known] int32 if HAS_MAP
    # memory of the program's own
    flags,  # [E_PAD] int32, whether the step needs the expert
    freed,  # [E_PAD] int32, the slots of victims in their order
    E: tl.constexpr,
    N: tl.constexpr,
    TOP_K: tl.constexpr,
    LFU: tl.constexpr,
    HALF_LIFE: tl.constexpr,
    UNIT: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    HAS_MAP: tl.constexpr,
    TRACED: tl.constexpr,
    WORDS: tl.constexpr,
    LANES: tl.constexpr,  # experts in a word
    E_PAD: tl.constexpr,
    N_PAD: tl.constexpr,
    FEW_IDS: tl.constexpr,
    IDS: tl.constexpr,
    CHUNK: tl.constexpr,  # experts that are ranked together, and slots
    SLOT_CHUNK: tl.constexpr,
):
    e = tl.arange(0, E_PAD)
    is_expert = e < E
    s = tl.arange(0, N_PAD)

    # The state before the step, read while the ids arrive.
    slot = tl.load(expert_to_slot + e, mask=is_expert, other=-1)
    held = tl.load(slot_to_expert + s, mask=s < N, other=0)
    row = tl.load(expert_to_row + e, mask=is_expert, other=-1)
    recency = tl.load(last_needed + e, mask=is_expert, other=0)
    i = tl.arange(0, _TOTALS_PAD)
    total = tl.load(totals + i, mask=i < _NUM_TOTALS, other=0)
    step = tl.load(totals + _STEPS) + 1
    if LFU:
        count = tl.load(frequency + e, mask=is_expert, other=0)

    if num_ids <= FEW_IDS:
        asked = tl.zeros([E_PAD], tl.int32)
        pairs_of_few = tl.zeros([32], tl.int32)
        for begin in tl.static_range(0, FEW_IDS, 32):
            ids = _wanted(
                topk_ids,
                is_padding,
                expert_map,
                num_ids,
                num_ids_known,
                begin + tl.arange(0, 32),
                TOP_K,
                HAS_PADDING,
                HAS_MAP,
            )
            asked |= tl.max((ids[None, :] == e[:, None]).to(tl.int32), axis=1)
            if TRACED:
                pairs_of_few += (ids >= 0).to(tl.int32)
        if TRACED:
            num_rows = tl.sum(pairs_of_few)
    else:
        pairs = tl.zeros([IDS], tl.int32)
        tl.store(flags + e, tl.zeros([E_PAD], tl.int32))
        tl.debug_barrier()
        for begin in range(0, num_ids, IDS):
            ids = _wanted(
                topk_ids,
                is_padding,
                expert_map,
                num_ids,
                num_ids_known,
                begin + tl.arange(0, IDS),
                TOP_K,
                HAS_PADDING,
                HAS_MAP,
            )
            tl.store(flags + ids, tl.full([IDS], 1, tl.int32), mask=ids >= 0)
            if TRACED:
                pairs += (ids >= 0).to(tl.int32)
        if TRACED:
            num_rows = tl.sum(pairs)
        tl.debug_barrier()
        asked = tl.load(flags + e)
    needed = (asked != 0) & is_expert
    miss = needed & (slot < 0)
    counts = tl.sum(needed.to(tl.int32) + (miss.to(tl.int32) << 16))
    num_needed = counts & 0xFFFF
    misses = counts >> 16
    placed = tl.minimum(misses, N - (num_needed - misses))  # misses that get a slot
    staged = misses - placed
    tl.store(num_loads, misses)

    if misses > 0:
        value = recency
        if LFU:
            value += count << 32
        enters = miss
        if staged > 0:
            rank = _rank(tl.where(miss, -value, _NEVER), e, E_PAD, CHUNK)
            enters = miss & (rank < placed)
        is_victim = is_expert & (slot >= 0) & (asked == 0)
        key = tl.gather(tl.where(is_victim, value, _NEVER), held, 0)
        key = tl.where(s < N, key, _NEVER)
        victim = tl.gather(_rank(key, held, N_PAD, SLOT_CHUNK), tl.maximum(slot, 0), 0)
        leaves = is_victim & (victim < placed)
        tl.store(freed + victim, slot, mask=leaves)
        tl.debug_barrier()
        is_staged = miss & (enters == 0)
        away = is_expert & (
            leaves | ((slot < 0) & (enters == 0))
        )  # not resident after the step
        before = tl.cumsum(
            enters.to(tl.int64)
            + (is_staged.to(tl.int64) << 20)
            + (away.to(tl.int64) << 40)
        )
        entry = (before & 0xFFFFF).to(tl.int32) - 1
        staged_entry = ((before >> 20) & 0xFFFFF).to(tl.int32) - 1
        slot = tl.where(enters, tl.load(freed + entry, mask=enters, other=0), slot)
        row = tl.where(away, (before >> 40).to(tl.int32) - 1, slot + (E - N))
        tl.store(expert_to_slot + e, tl.where(away, -1, slot), mask=is_expert)
        tl.store(expert_to_row + e, row, mask=is_expert)
        tl.store(slot_to_expert + slot, e, mask=enters)
        load = tl.where(enters, entry, placed + staged_entry)
        tl.store(load_experts + load, e, mask=miss)
        tl.store(load_rows + load, row, mask=miss)

    # The state before the step has been read by all threads behind this barrier.
    tl.debug_barrier()
    if num_needed > 0:
        if TRACED:
            at = ((step - 1) & (_RECORDS - 1)) * (_HEAD + WORDS)
            record = ring.to(tl.pointer_type(tl.int32)) + at
            tl.store(record, (step & 0xFFFFFFFF).to(tl.int32))
            tl.store(record + 1, num_rows)
            word = tl.arange(0, E_PAD // LANES)
            bits = tl.reshape(needed.to(tl.int32), [E_PAD // LANES, LANES])
            bits = bits << tl.arange(0, LANES)[None, :]
            tl.store(record + _HEAD + word, tl.sum(bits, axis=1), mask=word < WORDS)
        tl.store(last_needed + e, step, mask=needed)
        if LFU:
            count = tl.where(step % HALF_LIFE == 0, count >> 1, count)
            tl.store(frequency + e, count + needed.to(tl.int64) * UNIT, mask=is_expert)
        total += tl.where(i == _STEPS, 1, 0)
        total += tl.where(i == _NEEDED, num_needed, 0)
        total += tl.where(i == _HITS, num_needed - misses, 0)
        total += tl.where((i == _MISSES) | (i == _LOADS), misses, 0)
        total += tl.where(i == _STAGED, staged, 0)
        total += tl.where(i == _EVICTIONS, placed, 0)
        total += tl.where(i == _STAGED_STEPS, (staged > 0).to(tl.int32), 0)
        total += tl.where(i == _OVERFLOWS, (num_needed > N).to(tl.int32), 0)
        total += tl.where(i == _BYTES, misses.to(tl.int64) * bytes_per_expert, 0)
        tl.store(totals + i, total, mask=i < _NUM_TOTALS)
        tl.store(mirror.to(tl.pointer_type(tl.int64)) + i, total, mask=i < _NUM_TOTALS)

    if HAS_MAP:
        for begin in range(0, num_ids_known, IDS):
            at = begin + tl.arange(0, IDS)
            here = tl.load(expert_map + at, mask=at < num_ids_known, other=-1)
            row_of = tl.where(here >= 0, tl.gather(row, tl.maximum(here, 0), 0), -1)
            tl.store(rows + at, row_of, mask=at < num_ids_known)
    else:
        for begin in range(0, num_ids, IDS):
            at = begin + tl.arange(0, IDS)
            id_of = tl.load(topk_ids + at, mask=at < num_ids, other=-1)
            known = (id_of >= 0) & (id_of < E)
            row_of = tl.where(known, tl.gather(row, tl.where(known, id_of, 0), 0), -1)
            tl.store(rows + at, row_of, mask=at < num_ids)
