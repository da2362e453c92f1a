# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The data of a capacity plan: what a model takes, what there is, and what N slots
mean."""

from dataclasses import asdict, dataclass
from functools import cache

from vllm.model_executor.layers.fused_moe.expert_slots.capacity.host_memory import (
    HostMemory,
)
from vllm.model_executor.layers.fused_moe.expert_slots.config import clamp
from vllm.model_executor.layers.fused_moe.expert_slots.sizes import GIB
from vllm.model_executor.layers.fused_moe.expert_slots.weights.layout import (
    committed_bytes,
)

LIBRARY_BYTES = GIB // 2
"""Kept on every GPU for what no formula knows: workspaces of libraries, kernels,
fragmentation. An estimate."""


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
        processing_bytes: what the GPU holds while stock processes the layer's experts;
            0 if that needs no GPU.
    """

    experts: int
    top_k: int
    rows: tuple[tuple[str, int], ...]
    share: float = 1.0
    processing_bytes: int = 0

    @property
    def routed(self) -> float:
        """Experts of this rank that a token is expected to need."""
        return self.top_k * self.share

    @property
    def bytes_per_expert(self) -> int:
        return sum(row_bytes for _, row_bytes in self.rows)

    def resident(self, slots: int) -> int:
        """Experts on the GPU if `slots` are asked for."""
        return clamp(slots, self.top_k, self.experts)

    def slot_bytes(self, slots: int) -> int:
        return self.resident(slots) * self.bytes_per_expert

    def store_bytes(self, slots: int) -> int:
        """Bytes of the host store; none where every expert has its slot."""
        offloaded = self.resident(slots) < self.experts
        return self.experts * self.bytes_per_expert if offloaded else 0


@cache
def _staging_bytes(layers: tuple[MoELayer, ...], slots: int, page: int) -> int:
    """Bytes that the layers' tensors take beyond their slots: one set of staging rows
    for all layers, and what is lost at the edges of pages."""
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
        other_weight_bytes: every parameter and buffer except the routed experts, and
            what MLA keeps beside its own.
        kv_sequence_bytes: KV cache of one sequence of `max_model_len`.
        kv_block_bytes: one block of the KV cache; vLLM reserves one.
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
        """Everything on the GPU except the KV cache."""
        experts = self.slot_bytes(slots) + self.staging_bytes(slots, page)
        return experts + self.other_weight_bytes + self.overhead_bytes

    def processing_bytes(self, slots: int) -> int:
        """What the GPU holds while stock processes experts of a layer that has fewer
        slots than experts, at most. The other layers are stock's, as without slots."""
        return max(
            (
                layer.processing_bytes
                for layer in self.layers
                if layer.resident(slots) < layer.experts
            ),
            default=0,
        )

    def loading_bytes(self, slots: int, page: int) -> int:
        """Everything on the GPU while the last layer is processed. KV cache, graphs and
        intermediates come later."""
        experts = self.slot_bytes(slots) + self.staging_bytes(slots, page)
        return experts + self.other_weight_bytes + self.processing_bytes(slots)

    def kv_bytes(self, sequences: int) -> int:
        """KV cache that vLLM asks for to run `sequences` of `max_model_len`."""
        return self.kv_sequence_bytes * sequences + self.kv_block_bytes


@dataclass(frozen=True)
class Limits:
    """The memory that a plan may use, and the workload that it is made for.

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
class CapacityPlan:
    """Memory use for N slots, on the rank with the least memory left. Sizes in bytes.

    Attributes:
        slots: expert slots per MoE layer.
        experts: experts of a MoE layer on one rank.
        fits: whether it can start.
        reason: why it cannot; or the room that it leaves.
        gpu_bytes: all that one GPU holds except the KV cache: the sum of the next four.
        slot_bytes: the slots of all layers.
        staging_bytes: the staging rows that all layers share.
        other_weight_bytes: every weight except the routed experts.
        overhead_bytes: intermediates, graphs and libraries, all estimates: the next
            three.
        activation_bytes: intermediates of the largest batch.
        graph_bytes: CUDA graphs.
        library_bytes: workspaces of libraries, kernels, fragmentation.
        processing_bytes: what quantised experts take beside weights, slots and staging
            while some of a layer are processed, before there is a KV cache: at most.
        kv_cache_bytes: the KV cache that there is room for.
        kv_sequences: sequences of `max_model_len` that it holds.
        host_bytes: the host stores of one machine.
        resident_sequences: sequences that can decode together from the slots alone, as
            expected; `max_num_seqs` if there is a slot for every expert.
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
    processing_bytes: int
    kv_cache_bytes: int
    kv_sequences: float
    host_bytes: int
    resident_sequences: int

    def as_dict(self) -> dict[str, object]:
        return asdict(self)
