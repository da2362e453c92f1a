# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What N slots per layer cost, what fits, and which N `auto` takes: arithmetic, without
a model."""

import math
from collections.abc import Sequence

from vllm.model_executor.layers.fused_moe.expert_slots.capacity.plan import (
    LIBRARY_BYTES,
    CapacityPlan,
    Footprint,
    Limits,
)
from vllm.model_executor.layers.fused_moe.expert_slots.config import (
    MoEPrefetchError,
    clamp,
)
from vllm.model_executor.layers.fused_moe.expert_slots.sizes import (
    gib,
    size_in_bytes,
)


def distinct_experts(num_experts: int, top_k: float, sequences: int) -> float:
    """Experts of a layer that one decode step of `sequences` is expected to need.

    `E * (1 - (1 - k / E) ** b)`, if routing is uniform and independent. Real routing
    repeats experts, so this is the high end.
    """
    return num_experts * (1 - (1 - top_k / num_experts) ** sequences)


def resident_sequences(num_experts: int, top_k: float, slots: int) -> int:
    """Sequences that can decode together and still need no more than `slots` experts of
    a layer, as `distinct_experts` expects. Of fewer than E slots."""
    assert slots < num_experts
    sequences = 1
    while distinct_experts(num_experts, top_k, sequences + 1) <= slots:
        sequences += 1
    return sequences


class CapacityPlanner:
    """Says what N slots take and whether they fit.

    Args:
        footprints: one for each pipeline stage; the tensor-parallel ranks of a stage
            are alike.
        limits: of the machine and the workload.
        objection: why layers of the model cannot have slots, or None.
    """

    def __init__(
        self,
        footprints: Sequence[Footprint],
        limits: Limits,
        objection: str | None = None,
    ):
        self.footprints = footprints
        self.limits = limits
        self.objection = objection
        layers = [layer for footprint in footprints for layer in footprint.layers]
        self.num_layers = len(layers)
        self.num_experts = max(layer.experts for layer in layers)
        self.top_k = max(layer.top_k for layer in layers)
        self.routed = max(layer.routed for layer in layers)
        self.bytes_per_expert = max(layer.bytes_per_expert for layer in layers)

    @property
    def _counts(self) -> range:
        """The values that N can have, the largest first."""
        return range(self.num_experts, self._clamped(0) - 1, -1)

    def _clamped(self, slots: int) -> int:
        return clamp(slots, self.top_k, self.num_experts)

    @property
    def smallest(self) -> int:
        """The slots that a batch of one needs: the experts of its rows in one layer."""
        return self._clamped(self.top_k * self.limits.rows_per_sequence)

    def plan(self, slots: int) -> CapacityPlan:
        """The plan for `slots`, clamped to what a layer can have. It may not fit."""
        slots = self._clamped(slots)
        limits = self.limits
        rank = min(
            self.footprints, key=lambda f: self._left(f, slots) - self._kv_floor(f)
        )
        given = limits.kv_cache_bytes
        kv_cache = max(0, self._left(rank, slots)) if given is None else given
        usable = max(0, kv_cache - rank.kv_block_bytes)
        sequences = (
            usable / rank.kv_sequence_bytes if rank.kv_sequence_bytes else math.inf
        )
        host_bytes = self._host_bytes(slots)
        resident = limits.max_num_seqs
        if slots < self.num_experts:
            resident = resident_sequences(self.num_experts, self.routed, slots)
        reason = self._gpu_shortage(rank, slots) or self._host_shortage(slots)
        room = f"room for {sequences:,.1f} sequences of {limits.max_model_len:,} tokens"
        return CapacityPlan(
            slots=slots,
            experts=self.num_experts,
            fits=reason is None,
            reason=reason or room,
            gpu_bytes=rank.gpu_bytes(slots, limits.page),
            slot_bytes=rank.slot_bytes(slots),
            staging_bytes=rank.staging_bytes(slots, limits.page),
            other_weight_bytes=rank.other_weight_bytes,
            overhead_bytes=rank.overhead_bytes,
            activation_bytes=rank.activation_bytes,
            graph_bytes=rank.graph_bytes,
            library_bytes=LIBRARY_BYTES,
            processing_bytes=rank.processing_bytes(slots),
            kv_cache_bytes=kv_cache,
            kv_sequences=round(sequences, 2),
            host_bytes=host_bytes,
            resident_sequences=resident,
        )

    def layers_with(self, slots: int) -> list[tuple[int, float, int, int]]:
        """Experts, top-k (a rank's share of it), slots and bytes of an expert, of every
        MoE layer, for one rank of each pipeline stage."""
        return [
            (layer.experts, layer.routed, layer.resident(slots), layer.bytes_per_expert)
            for footprint in self.footprints
            for layer in footprint.layers
        ]

    def largest(self) -> int | None:
        """The largest N that fits, or None."""
        return next((slots for slots in self._counts if self.plan(slots).fits), None)

    def auto(self) -> int:
        """The largest N that leaves the KV cache its room.

        The room is `max_num_seqs` sequences of `max_model_len`, but no more than half
        of what weights and intermediates leave, and no less than one sequence. N is
        never below what a batch of one needs, if that fits at all.

        Raises:
            MoEPrefetchError: nothing fits.
        """

        def leaves_room(slots: int) -> bool:
            return self.plan(slots).fits and all(
                self._left(footprint, slots) >= self._kv_room(footprint)
                for footprint in self.footprints
            )

        counts = range(self.num_experts, self.smallest - 1, -1)
        for slots in counts:
            if leaves_room(slots):
                return slots
        if self.plan(self.smallest).fits:
            return self.smallest
        self.refuse(self.smallest, "auto")
        raise AssertionError

    def within(self, size: int, asked: str) -> int:
        """The largest N whose slots and staging take no more than `size` bytes of any
        GPU.

        Raises:
            MoEPrefetchError: top-k slots take more.
        """

        def taken(slots: int) -> int:
            return max(
                footprint.slot_bytes(slots)
                + footprint.staging_bytes(slots, self.limits.page)
                for footprint in self.footprints
            )

        slots = next((slots for slots in self._counts if taken(slots) <= size), None)
        if slots is None:
            least = self._counts[-1]
            raise MoEPrefetchError(
                f"--moe-gpu-prefetch {asked} is too little: {least} slots per layer "
                f"(the router's top-k) take {gib(taken(least))} with their staging. "
                "Give at least that."
            )
        return slots

    def meant(self, asked: int | str) -> int:
        """The N that `asked` means: a number, a size or `auto`. A number may not fit.

        Raises:
            MoEPrefetchError: nothing fits, for `auto`; or the size is too small.
        """
        if isinstance(asked, int):
            return asked
        return (
            self.auto() if asked == "auto" else self.within(size_in_bytes(asked), asked)
        )

    def refuse(self, slots: int, asked: int | str) -> None:
        """Refuses `slots` that the model or the machine cannot have.

        Args:
            asked: what the user asked for, for the message.

        Raises:
            MoEPrefetchError: the model's layers cannot have slots; or the slots do not
                fit, with what is needed, what there is, and the way out.
        """
        if self.objection and slots < self.num_experts:
            raise MoEPrefetchError(self.objection)
        plan = self.plan(slots)
        if plan.fits:
            return
        shortage = f"N={plan.slots} {plan.reason}"
        largest, least = self.largest(), self.plan(self.top_k)
        if largest is not None and largest >= self.num_experts:
            way_out = (
                "The model fits whole: serve it without --moe-gpu-prefetch, or free "
                "host memory."
            )
        elif largest is not None:
            way_out = f"The largest N that fits is {largest}."
        elif least.reason == self._host_shortage(least.slots):
            shortage = f"N={least.slots} {least.reason}"
            way_out = (
                "No N fits. Free host memory, spread the model over more machines, "
                "or lower the reserve with "
                "--moe-gpu-prefetch-config.host_memory_reserve GIB."
            )
        else:
            way_out = (
                f"No N fits, not even {self.top_k} (the router's top-k): raise "
                "--gpu-memory-utilization or --kv-cache-memory-bytes, lower "
                "--max-model-len, --max-num-seqs or --max-num-batched-tokens, or "
                "raise --tensor-parallel-size."
            )
        raise MoEPrefetchError(
            f"--moe-gpu-prefetch {asked} does not fit: {shortage}. {way_out}"
        )

    def _left(self, footprint: Footprint, slots: int) -> int:
        """Bytes of a GPU left for the KV cache; negative if the rest does not fit."""
        return self.limits.gpu_bytes - footprint.gpu_bytes(slots, self.limits.page)

    def _kv_floor(self, footprint: Footprint) -> int:
        """The KV cache without which vLLM does not start."""
        return footprint.kv_bytes(0 if self.limits.shortens else 1)

    def _kv_room(self, footprint: Footprint) -> int:
        """The KV cache that `auto` leaves room for."""
        if self.limits.kv_cache_bytes is not None:
            return self.limits.kv_cache_bytes
        workload = footprint.kv_bytes(self.limits.max_num_seqs)
        free = (
            self.limits.gpu_bytes
            - footprint.other_weight_bytes
            - footprint.overhead_bytes
        )
        return max(self._kv_floor(footprint), min(workload, free // 2))

    def _gpu_shortage(self, rank: Footprint, slots: int) -> str | None:
        limits = self.limits
        kv_cache = limits.kv_cache_bytes
        needed = self._kv_floor(rank)
        if kv_cache is not None and needed > kv_cache:
            return (
                f"leaves no room for one sequence: {limits.max_model_len:,} tokens "
                f"take {gib(needed)} of KV cache, {gib(kv_cache)} are given"
            )
        kv_cache = needed if kv_cache is None else kv_cache
        total = rank.gpu_bytes(slots, limits.page) + kv_cache
        if total <= limits.gpu_bytes:
            return self._loading_shortage(slots)
        return (
            f"needs {gib(total)} ({gib(rank.slot_bytes(slots))} slots, "
            f"{gib(rank.staging_bytes(slots, limits.page))} staging, "
            f"{gib(rank.other_weight_bytes)} other weights, "
            f"{gib(rank.overhead_bytes)} intermediates, graphs and libraries, "
            f"{gib(kv_cache)} KV cache), there are {limits.gpu_limit}"
        )

    def _loading_shortage(self, slots: int) -> str | None:
        """Why the GPU of some rank is too small while the weights are processed."""
        limits = self.limits
        rank = max(
            self.footprints, key=lambda f: f.loading_bytes(slots, self.limits.page)
        )
        total = rank.loading_bytes(slots, limits.page)
        if total <= limits.gpu_bytes:
            return None
        return (
            f"needs {gib(total)} while it is loaded ({gib(rank.slot_bytes(slots))} "
            f"slots, {gib(rank.staging_bytes(slots, limits.page))} staging, "
            f"{gib(rank.other_weight_bytes)} other weights, "
            f"{gib(rank.processing_bytes(slots))} at most to process quantised "
            f"experts), there are {limits.gpu_limit}"
        )

    def _host_bytes(self, slots: int) -> int:
        """Bytes of host stores, on the machine that keeps the most."""
        return self._on_one_host([f.store_bytes(slots) for f in self.footprints])

    def _on_one_host(self, stages: list[int]) -> int:
        """Bytes of all ranks on one machine, on the machine where that is the most.

        Args:
            stages: bytes of one rank of each pipeline stage.
        """
        ranks = self.limits.ranks_per_host
        tensor_ranks = max(1, ranks // len(stages))
        return sum(sorted(stages * tensor_ranks, reverse=True)[:ranks])

    def host_need(self, slots: int) -> int:
        """Bytes of host memory that must be available for `slots`, the reserve
        included; 0 if there is no host store."""
        limits, stores = self.limits, self._host_bytes(slots)
        if not stores:
            return 0
        taken = stores + self._on_one_host(
            [f.host_table_bytes for f in self.footprints]
        )
        if limits.host_is_device:
            taken += self._on_one_host(
                [
                    f.slot_bytes(slots)
                    + f.staging_bytes(slots, limits.page)
                    + f.other_weight_bytes
                    for f in self.footprints
                ]
            )
        return taken + limits.host_reserve

    def _host_shortage(self, slots: int) -> str | None:
        host, need = self.limits.host, self.host_need(slots)
        if host is None or host.available >= need:
            return None
        return (
            f"needs {gib(need - self.limits.host_reserve)} of host memory, "
            f"{gib(host.available)} are available and {gib(self.limits.host_reserve)} "
            "must stay free"
        )
