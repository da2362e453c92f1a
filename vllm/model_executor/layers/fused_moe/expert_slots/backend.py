# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The interface that a platform implements for expert slots, and which platform this
is."""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from functools import cache
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
    first_tables,
)
from vllm.model_executor.layers.fused_moe.expert_slots.trace.ring import TraceRing
from vllm.model_executor.layers.fused_moe.expert_slots.weights.memory import Memory
from vllm.model_executor.layers.fused_moe.expert_slots.weights.rows import ExpertRows


class SlotManager(ABC):
    """Keeps the experts that a step needs in their rows. One per MoE layer and rank.

    No slot is empty at the start, so that the first request does not pay for an empty
    cache.

    Args:
        config: what was asked for.
        rows: the layer's.
        layer_name: names the counters.
        rank: of this worker, names the counters.
        replica: whether another rank makes the same steps, because tensor parallelism
            splits each expert over both.

    Attributes:
        ring: the last steps, where a trace is recorded; None without one, and on a
            replica.
    """

    def __init__(
        self,
        config: MoEPrefetchConfig,
        rows: ExpertRows,
        layer_name: str = "",
        rank: int = 0,
        replica: bool = False,
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
            replica,
        )
        self.replica = replica
        traced = config.trace is not None and not replica
        self.ring = TraceRing(self.num_experts) if traced else None

    @abstractmethod
    def step(
        self, topk_ids: torch.Tensor, is_padding: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Decides one step and loads what it misses.

        Args:
            topk_ids: [tokens, top_k] integers, -1 for none. With an expert map: the
                model's expert ids. Otherwise: this rank's.
            is_padding: [tokens] bool, the tokens that need no expert.

        Returns:
            The ids as row numbers, in the shape of `topk_ids`; -1 stays -1. The ids of
            padding become row numbers too, and what the rows hold is undefined. With an
            expert map (expert parallelism): the map from the model's experts to rows,
            -1 = on another rank.
        """

    @abstractmethod
    def reset(self, start: Ranking | None = None) -> None:
        """Back to the start, with all counters at zero.

        Args:
            start: residents and their order, of any number of slots. Not given: experts
                0 ... N-1 without a history.
        """

    def _first(self, start: Ranking | None) -> tuple[ResidencyTables, ExpertHistory]:
        """The tables and the history that `reset` begins with, on the host."""
        history = ExpertHistory(
            self.num_experts, self.config.policy, self.config.lfu_half_life
        )
        return first_tables(history, self.num_slots, start), history

    @abstractmethod
    def residency(self) -> list[int]:
        """The expert in each slot, [N], after a check that the tables agree.

        Raises:
            AssertionError: the tables do not agree.
        """

    @abstractmethod
    def ranking(self) -> Ranking:
        """The residents by their worth. Any thread may call this, also during a step;
        it then reads the tables as they are at some moment of the step.

        Raises:
            AssertionError: the tables do not agree, as may be during a step.
        """


class Backend(ABC):
    """Expert slots on one platform.

    Attributes:
        pins: whether kernels read the host store, which must then be page-locked.
    """

    pins: bool

    @abstractmethod
    def choosing_kernels(self, moe_config: Any) -> AbstractContextManager[None]:
        """Within, stock builds a layer with a kernel that slots can serve.

        Args:
            moe_config: the layer's.

        Raises:
            MoEPrefetchError: on leaving, if stock has none of these for the layer.
        """

    @abstractmethod
    def objection(self, layer: Any) -> str | None:
        """Why a layer that stock has built cannot have slots, or None."""

    @abstractmethod
    def slotted(self, experts_cls: type) -> type | None:
        """The class that is mixed into `experts_cls`, one of stock's, to run it on
        rows. None if slots cannot serve it."""

    @abstractmethod
    def processes_on_device(self, layer: Any) -> bool:
        """Whether stock rearranges the layer's experts, and needs the device for it. If
        not, they are processed in host memory, or left as they are."""

    @abstractmethod
    def memory(self, device: torch.device) -> Memory:
        """New memory for the rows of a worker's layers."""

    @abstractmethod
    def manager(
        self, config: MoEPrefetchConfig, rows: ExpertRows, layer: Any, rank: int
    ) -> SlotManager:
        """The manager of a layer's rows."""


def is_replica(layer: Any) -> bool:
    """Whether another rank makes the same steps as this one, of a `RoutedExperts`. With
    expert parallelism no rank does."""
    return layer.moe_config.moe_parallel_config.tp_rank > 0


@cache
def _mixed(mixin: type, stock: type) -> type:
    return type(
        f"Slotted{stock.__name__}", (mixin, stock), {"__module__": mixin.__module__}
    )


def on_rows(experts: Any, mixin: type, manager: SlotManager) -> Any:
    """What runs a kernel of stock's on rows: an object with `mixin` and the attributes
    of `experts`. It is not constructed: some of stock's methods accept no class but
    their own, and what stock set up is kept.

    Args:
        experts: stock's experts object.
        mixin: the answer of `Backend.slotted` for its class.
        manager: of the layer's rows.
    """
    stock: type = type(experts)
    slotted: Any = object.__new__(_mixed(mixin, stock))
    vars(slotted).update(vars(experts))
    slotted.slot_manager = manager
    return slotted


def current_backend() -> Backend:
    """The backend of this platform.

    Raises:
        MoEPrefetchError: the platform has none.
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
