# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a platform implements so that experts can live in slots, and which platform this
is."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from vllm.platforms import current_platform

from vllm.model_executor.layers.fused_moe.expert_slots.config import (
    MoEPrefetchConfig,
    MoEPrefetchError,
)
from vllm.model_executor.layers.fused_moe.expert_slots.counters import SlotCounters
from vllm.model_executor.layers.fused_moe.expert_slots.decisions.policy import (
    ExpertHistory,
    Ranking,
)
from vllm.model_executor.layers.fused_moe.expert_slots.decisions.step import (
    ResidencyTables,
)
from vllm.model_executor.layers.fused_moe.expert_slots.weights.elastic import Memory
from vllm.model_executor.layers.fused_moe.expert_slots.weights.rows import ExpertRows


class SlotManager(ABC):
    """Keeps the experts that a step needs in their rows. One per MoE layer and rank.

    No slot is empty at the start, so that the first request does not pay for an empty
    cache.
    """

    def __init__(
        self,
        config: MoEPrefetchConfig,
        rows: ExpertRows,
        layer_name: str = "",
        rank: int = 0,
    ):
        self.config = config
        self.rows = rows
        self.store = rows.store
        self.num_experts = self.store.num_experts
        self.num_slots = rows.num_slots
        self.counters = SlotCounters(
            layer_name,
            rank,
            self.num_slots,
            self.store.bytes_per_expert,
            self.num_experts,
        )

    @abstractmethod
    def step(
        self, topk_ids: torch.Tensor, is_padding: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Decides one step and loads what it misses.

        Args:
            topk_ids: [tokens, top_k] integers, expert ids, or -1 for none.
            is_padding: [tokens] bool; rows that need nothing, whatever they route.

        Returns:
            The ids as row numbers, like `topk_ids`; -1 stays -1, and a row of padding
                gets
            rows of whatever they hold. With an expert map (expert
            parallelism) the map from the model's experts to rows instead, -1 = on
                another rank.
        """

    @abstractmethod
    def reset(self, start: Ranking | None = None) -> None:
        """Back to the start, nothing counted: in the slots are experts 0 ... N-1,
        without a history, or those of `start`, with the order of it. `start` may be
        another N's."""

    def _first(self, start: Ranking | None) -> tuple[ResidencyTables, ExpertHistory]:
        """What `reset` begins with, on the host."""
        history = ExpertHistory(
            self.num_experts, self.config.policy, self.config.lfu_half_life
        )
        if start is None:
            return ResidencyTables(self.num_experts, self.num_slots), history
        start = start.fitted(self.num_experts, self.num_slots)
        history.resume(start)
        return ResidencyTables(self.num_experts, self.num_slots, start.experts), history

    @abstractmethod
    def residency(self) -> list[int]:
        """The expert in each slot, [N], after a check of the tables against each other.

        Raises:
            AssertionError: they do not fit each other.
        """

    @abstractmethod
    def ranking(self) -> Ranking:
        """The residents by their worth. May be called on any thread, also within a
        step: it then sees the tables of some moment of the step.

        Raises:
            AssertionError: the tables do not fit each other, as within a step.
        """


class Backend(ABC):
    """Expert slots on one platform.

    Attributes:
        pins: whether kernels read the host store, so that it must be page-locked.
    """

    pins: bool

    @abstractmethod
    def prepare(self, moe_config: Any, quant_config: Any) -> None:
        """Chooses, before stock builds a layer, the kernel that slots can serve. For
        quantised experts there is none yet: stock chooses, and `objection` says so."""

    @abstractmethod
    def objection(self, layer: Any) -> str | None:
        """Why a layer that stock has built cannot have slots, or None."""

    def processed_width(self, layer: Any) -> int:
        """The width of an expert once stock has processed its weights, which may pad
        it."""
        return int(layer.moe_config.intermediate_size_per_partition)

    @abstractmethod
    def slotted(self, experts_cls: type) -> type:
        """One of stock's experts classes, over slots."""

    @abstractmethod
    def memory(self, device: torch.device) -> Memory:
        """New memory for the rows of a worker's layers."""

    @abstractmethod
    def manager(
        self, config: MoEPrefetchConfig, rows: ExpertRows, layer: Any, rank: int
    ) -> SlotManager:
        """The manager of a layer's rows."""


def current_backend() -> Backend:
    """This platform's.

    Raises:
        MoEPrefetchError: it has none.
    """
    if current_platform.is_cuda():
        from vllm.model_executor.layers.fused_moe.expert_slots.cuda.backend import (
            CudaBackend,
        )

        return CudaBackend()
    if current_platform.is_cpu():
        from vllm.model_executor.layers.fused_moe.expert_slots.cpu.backend import (
            CPUBackend,
        )

        return CPUBackend()
    here = getattr(current_platform, "device_name", "this platform")
    raise MoEPrefetchError(
        f"--moe-gpu-prefetch: expert slots run on CUDA and on the CPU, not on {here}. "
        "Serve without --moe-gpu-prefetch."
    )
