# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Stock's kernel on a loaded layer, with all experts resident and from slots, given the
same batch and the same alignment: the bits must be equal."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.experts import marlin_moe

from benchmarks.results import Row
from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchConfig
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.marlin_experts import (
    mapping_blocks,
)
from vllm.model_executor.layers.fused_moe.expert_slots.replacing import replaced
from vllm.model_executor.layers.fused_moe.expert_slots.weights.bundle import Bundle
from vllm.model_executor.layers.fused_moe.expert_slots.weights.rows import ExpertRows

REPLAYS = 3

Tensors = dict[str, torch.Tensor]


class SameAlignment:
    """Stands in the place of `marlin_moe.moe_align_block_size`: a batch is aligned once
    and everyone gets a copy. Marlin's bits depend on the order of rows within an
    expert, which stock's own alignment of a large batch does not repeat."""

    def __init__(self) -> None:
        align: Any = marlin_moe.moe_align_block_size
        self._align = getattr(align, "__wrapped__", align)  # below our hook
        self._asked: Any = None
        self._made: tuple[torch.Tensor, ...] | None = None
        self._given: tuple[torch.Tensor, ...] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        if self._made is None:
            self._asked = args, kwargs
            self._made = self._align(*args, **kwargs)
        self._given = tuple(tensor.clone() for tensor in self._made)
        return self._given

    def forget(self) -> None:
        """Before a batch of another size."""
        self._made = None

    def renew(self) -> None:
        """After the batch has changed in its place, for graphs that copy from here."""
        if self._made is not None:
            args, kwargs = self._asked
            for kept, new in zip(self._made, self._align(*args, **kwargs), strict=True):
                kept.copy_(new)

    def mapped_by(self, table: torch.Tensor) -> bool:
        """Whether the last one who asked has the rows of the experts in their place. To
        be asked after an eager step."""
        if self._made is None:
            return True
        sorted_ids, experts, padded = self._made
        block = len(sorted_ids) // len(experts)
        used = int(padded) // block
        wanted, found = table[experts[:used].long()], self._given[1][:used]
        return torch.equal(sorted_ids, self._given[0]) and torch.equal(wanted, found)


class Kernels:
    """One layer's kernel in both ways. The layer cannot serve afterwards."""

    def __init__(self, layer: Any):
        self.layer = layer
        self.impl = layer.quant_method.moe_kernel.impl
        self.bundle = Bundle.of(layer, layer.local_num_experts)
        self.store, self.memory = layer.slot_manager.store, layer._memory
        self.slotted = self.impl.fused_experts
        self.stock: Any = object.__new__(type(self.slotted).__bases__[-1])
        self.stock.__dict__.update(vars(self.slotted))
        self.device = layer.w13_weight.device
        self.full = {
            name: home.to(self.device) for name, home in self.store.tensors.items()
        }

    def use_stock(self) -> None:
        """All experts resident."""
        self.bundle.set_rows(self.layer, self.full)
        self.impl.fused_experts = self.stock

    def use_slots(self, slots: int) -> None:
        """Slots that hold the first experts."""
        rows = ExpertRows(self.store, slots, self.memory)
        self.bundle.set_rows(self.layer, rows.tensors)
        self.impl.fused_experts = self.slotted
        self.slotted.slot_manager = self.layer._backend.manager(
            MoEPrefetchConfig(slots=slots), rows, self.layer, 0
        )

    def run(self, batch: Tensors) -> torch.Tensor:
        """The layer's output, [tokens, hidden]."""
        layer = self.layer
        return layer.quant_method.moe_kernel.apply(
            w1=layer.w13_weight,
            w2=layer.w2_weight,
            activation=layer.activation,
            global_num_experts=layer.global_num_experts,
            expert_map=layer.expert_map,
            apply_router_weight_on_input=layer.apply_router_weight_on_input,
            **batch,
        )

    def batch(self, tokens: int, generator: torch.Generator) -> Tensors:
        """Random hidden states, weights and ids of the router."""
        config = self.layer.moe_config
        scores = torch.rand(tokens, self.layer.local_num_experts, generator=generator)
        weights, ids = scores.topk(self.layer.top_k)
        x = torch.randn(tokens, config.hidden_dim, generator=generator)
        made = {"hidden_states": x.to(config.in_dtype), "topk_weights": weights}
        made["topk_ids"] = ids.int()
        return {name: tensor.to(self.device) for name, tensor in made.items()}

    def captured(self, batch: Tensors) -> tuple[Callable[[], None], torch.Tensor]:
        """A CUDA graph of `run`, and where it leaves its output."""
        self.run(batch)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = self.run(batch)
        return graph.replay, out


def compared(layer: Any, tokens: Sequence[int]) -> Row:
    """Runs steps of so many tokens on numbers of slots from top-k to all but one
    expert, eagerly and on a GPU in graphs. No step may be larger than the engine's."""
    kernels, align = Kernels(layer), SameAlignment()
    experts = layer.local_num_experts
    all_slots = sorted({layer.top_k, experts // 4, experts // 2, experts - 1})
    generator = torch.Generator().manual_seed(0)
    results = []
    with replaced(marlin_moe, "moe_align_block_size", mapping_blocks(align)):
        for size in tokens:
            for slots in all_slots:
                align.forget()
                batch = kernels.batch(size, generator)
                results += _eager(kernels, align, batch, slots)
                if kernels.device.type == "cuda":
                    results += _graphs(kernels, align, batch, slots, generator)
    return {"kernel equal to stock's": all(results), "kernel steps": len(results)}


def _eager(
    kernels: Kernels, align: SameAlignment, batch: Tensors, slots: int
) -> list[bool]:
    kernels.use_stock()
    stock = kernels.run(batch).clone()
    kernels.use_slots(slots)
    equal = torch.equal(kernels.run(batch), stock)
    table = getattr(kernels.slotted.slot_manager, "expert_to_row", None)
    mapped = table is None or align.mapped_by(table)
    return [equal and mapped and bool(stock.isfinite().all() and stock.any())]


def _graphs(
    kernels: Kernels,
    align: SameAlignment,
    batch: Tensors,
    slots: int,
    generator: torch.Generator,
) -> list[bool]:
    """The batch changes in its place. What a step finds in the slots is what the one
    before it left there."""
    kernels.use_stock()
    replay_stock, stock = kernels.captured(batch)
    kernels.use_slots(slots)
    replay_slots, out = kernels.captured(batch)
    results = []
    for _ in range(REPLAYS):
        fresh = kernels.batch(len(batch["topk_ids"]), generator)
        for name, tensor in batch.items():
            tensor.copy_(fresh[name])
        align.renew()
        replay_stock()
        replay_slots()
        results.append(torch.equal(out, stock))
    return results
