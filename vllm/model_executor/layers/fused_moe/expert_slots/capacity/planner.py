# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What N slots per layer cost, what fits, and which N `auto` takes: arithmetic, no
model."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache

from vllm.model_executor.layers.fused_moe.expert_slots.capacity.host_memory import (
    HostMemory,
)
from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError
from vllm.model_executor.layers.fused_moe.expert_slots.sizes import (
    GIB,
    gib,
    size_in_bytes,
)
from vllm.model_executor.layers.fused_moe.expert_slots.weights.elastic import (
    committed_bytes,
)

CONTEXT_BYTES = GIB // 2
"""CUDA's context: what a process takes of a GPU before it allocates anything. An
estimate; where a GPU is at hand, its free memory is read instead, with a context."""

LIBRARY_BYTES = GIB // 2
"""Kept on every GPU for what no formula knows: workspaces of libraries, kernels,
fragmentation. An estimate."""

COMMUNICATION_BYTES = GIB
"""Buffers of NCCL and of vLLM's own all-reduce, on every GPU of several. An estimate:
vLLM's logs show about 1.4 GiB beside torch with two GPUs, the context included."""

GRAPH_BYTES_PER_LAYER = 384 << 10
"""What a layer takes of a captured CUDA graph. An estimate: 24 MiB for a graph of 64
layers, as measured in vLLM issue 50780."""


def distinct_experts(num_experts: int, top_k: float, sequences: int) -> float:
    """Experts of a layer that one decode step of `sequences` needs: `E * (1 - (1 - k /
    E) ** b)`, if routing is uniform and independent. Real routing is more local, so
    this is the high end."""
    return num_experts * (1 - (1 - top_k / num_experts) ** sequences)


def resident_sequences(num_experts: int, top_k: float, slots: int) -> int:
    """Sequences that may decode together before their experts outgrow fewer than E
    slots."""
    assert slots < num_experts
    sequences = 1
    while distinct_experts(num_experts, top_k, sequences + 1) <= slots:
        sequences += 1
    return sequences


@dataclass(frozen=True)
class MoELayer:
    """One MoE layer on one rank.

    Attributes:
        experts: of this rank.
        top_k: experts that the router chooses for a token, on any rank.
        rows: names of the layer's per-expert tensors, and the bytes that one expert
            takes in each.
        share: of the model's experts, those of this rank; below 1 under expert
            parallelism.
    """

    experts: int
    top_k: int
    rows: tuple[tuple[str, int], ...]
    share: float = 1.0

    @property
    def routed(self) -> float:
        """Experts of this rank that a token is expected to need."""
        return self.top_k * self.share

    @property
    def bytes_per_expert(self) -> int:
        return sum(row_bytes for _, row_bytes in self.rows)

    def resident(self, slots: int) -> int:
        """Experts on the GPU if `slots` are asked for: at least top-k, at most all."""
        return min(self.experts, max(slots, self.top_k))

    def slot_bytes(self, slots: int) -> int:
        return self.resident(slots) * self.bytes_per_expert

    def store_bytes(self, slots: int) -> int:
        """Bytes of the host store; none where every expert has its slot."""
        offloaded = self.resident(slots) < self.experts
        return self.experts * self.bytes_per_expert if offloaded else 0


@cache
def _staging_bytes(layers: tuple[MoELayer, ...], slots: int, page: int) -> int:
    """What the layers' tensors take beyond their slots: one set of staging rows for all
    layers, and what is lost at the edges of pages."""
    elastic = [layer for layer in layers if layer.resident(slots) < layer.experts]
    tensors = (
        (name, layer.experts, layer.experts - layer.resident(slots), row_bytes)
        for layer in elastic
        for name, row_bytes in layer.rows
    )
    return committed_bytes(tensors, page) - sum(
        layer.slot_bytes(slots) for layer in elastic
    )


@dataclass(frozen=True)
class Footprint:
    """What one rank of a model takes. All sizes in bytes.

    Attributes:
        layers: the MoE layers of this rank.
        other_weight_bytes: every parameter and buffer but the routed experts.
        kv_sequence_bytes: KV cache of one sequence of `max_model_len`.
        kv_block_bytes: one block of the KV cache; vLLM keeps one back.
        activation_bytes: intermediates of the largest batch, an estimate
            (docs/sizing.md).
        graph_bytes: captured CUDA graphs, an estimate.
        host_table_bytes: tensors that the model itself keeps in host memory.
    """

    layers: tuple[MoELayer, ...]
    other_weight_bytes: int
    kv_sequence_bytes: int
    kv_block_bytes: int
    activation_bytes: int
    graph_bytes: int = 0
    host_table_bytes: int = 0

    @property
    def overhead_bytes(self) -> int:
        return self.activation_bytes + self.graph_bytes + LIBRARY_BYTES

    def slot_bytes(self, slots: int) -> int:
        return sum(layer.slot_bytes(slots) for layer in self.layers)

    def store_bytes(self, slots: int) -> int:
        return sum(layer.store_bytes(slots) for layer in self.layers)

    def staging_bytes(self, slots: int, page: int) -> int:
        """The staging rows that all layers share, in pages of `page` bytes."""
        return _staging_bytes(self.layers, slots, page)

    def gpu_bytes(self, slots: int, page: int) -> int:
        """Everything on the GPU but the KV cache."""
        experts = self.slot_bytes(slots) + self.staging_bytes(slots, page)
        return experts + self.other_weight_bytes + self.overhead_bytes

    def kv_bytes(self, sequences: int) -> int:
        """KV cache that vLLM asks for to run `sequences` of `max_model_len`."""
        return self.kv_sequence_bytes * sequences + self.kv_block_bytes


@dataclass(frozen=True)
class Limits:
    """What a plan must keep to, and the workload it is made for.

    Attributes:
        gpu_bytes: what vLLM may use of each GPU.
        gpu_limit: the same in words.
        kv_cache_bytes: the KV cache if it was given in bytes, else None: what is left.
        host: this machine's memory, or None if the question is about another machine.
        host_reserve: bytes of host memory that must stay available.
        ranks_per_host: ranks that keep a host store on one machine.
        host_is_device: slots and weights are host memory too (the CPU platform).
        page: bytes of a page of the memory that slots lie in.
        max_num_seqs: sequences that may run together.
        max_model_len: tokens of the longest sequence.
        shortens: vLLM lowers `max_model_len` to what the KV cache holds.
        rows_per_sequence: rows that one decoding sequence routes: 1 + speculative
            tokens.
    """

    gpu_bytes: int
    gpu_limit: str
    kv_cache_bytes: int | None
    host: HostMemory | None
    host_reserve: int
    ranks_per_host: int
    host_is_device: bool
    page: int
    max_num_seqs: int
    max_model_len: int
    shortens: bool
    rows_per_sequence: int


@dataclass(frozen=True)
class Plan:
    """What one N means, on the rank that it leaves least. All sizes in bytes.

    Attributes:
        slots: expert slots per MoE layer.
        experts: experts of a MoE layer on one rank.
        fits: whether it can start.
        reason: why not; or what room it leaves.
        gpu_bytes: all that one GPU holds but the KV cache: the sum of the next four.
        slot_bytes: the slots of all layers.
        staging_bytes: the staging rows that all layers share.
        other_weight_bytes: every weight but the routed experts.
        overhead_bytes: intermediates, graphs and libraries, all estimates: the next
            three.
        activation_bytes: intermediates of the largest batch.
        graph_bytes: CUDA graphs.
        library_bytes: workspaces of libraries, kernels, fragmentation.
        kv_cache_bytes: the KV cache that there is room for.
        kv_sequences: sequences of `max_model_len` that it holds.
        host_bytes: the host stores of one machine.
        resident_sequences: sequences that decode together without outgrowing the slots;
            `max_num_seqs` if there is a slot for every expert.
    """

    slots: int
    experts: int
    fits: bool
    reason: str
    gpu_bytes: int
    slot_bytes: int
    staging_bytes: int
    other_weight_bytes: int
    overhead_bytes: int
    activation_bytes: int
    graph_bytes: int
    library_bytes: int
    kv_cache_bytes: int
    kv_sequences: float
    host_bytes: int
    resident_sequences: int

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


class MemoryPlanner:
    """Answers what fits.

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
        """What N may be, the largest first. A rank may have fewer experts than the
        top-k."""
        return range(self.num_experts, min(self.num_experts, self.top_k) - 1, -1)

    @property
    def smallest(self) -> int:
        """The slots that a batch of one needs: the experts of its rows in one layer."""
        return min(self.num_experts, self.top_k * self.limits.rows_per_sequence)

    def plan(self, slots: int) -> Plan:
        """The plan of `slots` (raised to top-k, lowered to E), fitting or not."""
        slots = min(self.num_experts, max(self.top_k, slots))
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
        return Plan(
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
        """The largest N that leaves the KV cache its room: `max_num_seqs` sequences of
        `max_model_len`, but no more than half of what weights and intermediates leave,
        and no less than one sequence. Never below what a batch of one needs, if that
        fits at all.

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
            MoEPrefetchError: not even top-k slots do.
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
        """The N that `asked` means, fitting or not: a number, a size or `auto`.

        Raises:
            MoEPrefetchError: `auto`, and nothing fits; or a size that is too little.
        """
        if isinstance(asked, int):
            return asked
        return (
            self.auto() if asked == "auto" else self.within(size_in_bytes(asked), asked)
        )

    def refuse(self, slots: int, asked: int | str) -> None:
        """Raises: MoEPrefetchError: the model's layers cannot have slots; or `slots` do
        not fit: what is
            needed, what there is, and the way out.
        """
        if self.objection and slots < self.num_experts:
            raise MoEPrefetchError(self.objection)
        plan = self.plan(slots)
        if plan.fits:
            return
        shortage = f"N={plan.slots} {plan.reason}"
        largest, least = self.largest(), self.plan(self.top_k)
        if largest is not None:
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
        """Room for the KV cache on a GPU; below zero if not even the rest fits."""
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
            return None
        return (
            f"needs {gib(total)} ({gib(rank.slot_bytes(slots))} slots, "
            f"{gib(rank.staging_bytes(slots, limits.page))} staging, "
            f"{gib(rank.other_weight_bytes)} other weights, "
            f"{gib(rank.overhead_bytes)} intermediates, graphs and libraries, "
            f"{gib(kv_cache)} KV cache), there are {limits.gpu_limit}"
        )

    def _host_bytes(self, slots: int) -> int:
        """Host stores of the machine that has to keep most."""
        return self._on_one_host([f.store_bytes(slots) for f in self.footprints])

    def _on_one_host(self, stages: list[int]) -> int:
        """Bytes of the ranks on one machine, given those of a rank of each stage: the
        largest."""
        ranks = self.limits.ranks_per_host
        tensor_ranks = max(1, ranks // len(stages))
        return sum(sorted(stages * tensor_ranks, reverse=True)[:ranks])

    def host_need(self, slots: int) -> int:
        """Host memory that must be available for `slots`, the reserve included; 0 if
        nothing is kept there."""
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
