# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Stock's Marlin fused-MoE kernel over permuted rows.

Marlin divides its work among thread blocks by the number and order of the expert
blocks, and adds partial sums where a division falls into a block. So row numbers in the
place of expert ids would change the bits. Stock aligns the batch on expert ids, as with
full residency. Then the list of expert blocks is mapped to rows, between stock's
alignment and its two GEMMs. Everything else that stock reads by id (the map of expert
parallelism, the sum over a token's experts) stays as it is.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch

from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.block_map_kernel import (
    map_blocks,
)
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.experts import (
    padding_of_step,
)
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.manager import (
    CudaSlotManager,
)

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.experts.marlin_moe import (
        MarlinExperts as _Stock,
    )
else:
    _Stock = object

MARLIN_EXPERTS_CLASSES = {"MarlinExperts"}
"""Stock's kernels that align a batch by `marlin_moe.moe_align_block_size`, once in a
call. `BatchedMarlinExperts` does not."""


class _Alignment:
    """One call of stock's kernel, whose alignment is to be mapped by a table."""

    def __init__(self, expert_to_row: torch.Tensor):
        self.expert_to_row = expert_to_row
        self.mapped = False


_current: ContextVar[_Alignment | None] = ContextVar("expert_alignment", default=None)
"""The call that this thread is in. A layer without slots in the same process, and
another engine's thread, see None."""


def mapping_blocks(align: Callable[..., Any]) -> Callable[..., Any]:
    """The function that stands in the place of `marlin_moe.moe_align_block_size`.

    Within the call of a slotted layer it maps the list of expert blocks, the second of
    what `align` returns. Elsewhere it is `align`. Two of them around each other map
    once.
    """

    @functools.wraps(align)
    def align_then_map(*args: Any, **kwargs: Any) -> Any:
        aligned = align(*args, **kwargs)
        call = _current.get()
        if call is not None and not call.mapped:
            map_blocks(aligned[1], call.expert_to_row)
            call.mapped = True
        return aligned

    return align_then_map


@contextmanager
def _blocks_mapped(expert_to_row: torch.Tensor) -> Iterator[None]:
    """Within, the next alignment of this thread is mapped.

    Raises:
        MoEPrefetchError: there was none, so the experts were taken from wrong rows.
    """
    call = _Alignment(expert_to_row)
    token = _current.set(call)
    try:
        yield
    finally:
        _current.reset(token)
    if not call.mapped:
        raise MoEPrefetchError(
            "--moe-gpu-prefetch: vLLM's Marlin kernel did not align its batch by "
            "marlin_moe.moe_align_block_size as we know it, so expert slots cannot "
            "follow. Disable the plugin that changed it with VLLM_PLUGINS, or serve "
            "without --moe-gpu-prefetch."
        )


class SlottedMarlinExperts(_Stock):
    """Runs stock's class on rows; `backend.on_rows` mixes it in.

    It has no constructor: an object of stock's class, made and set up by stock, can be
    taken over by copying its attributes.

    Attributes:
        slot_manager: the layer's manager, set once its rows are made.
    """

    slot_manager: CudaSlotManager | None = None

    def apply(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Decides, loads and computes one step of the layer. Takes what stock's `apply`
        takes, and hands it on unchanged.

        Under expert parallelism stock's alignment applies its expert map and returns
        ids of this rank, which is what the table takes.

        Raises:
            MoEPrefetchError: the list of blocks was not mapped, because another plugin
                has replaced stock's alignment.
        """
        assert self.slot_manager is not None
        self.slot_manager.step(topk_ids, padding_of_step(len(topk_ids)))
        with _blocks_mapped(self.slot_manager.expert_to_row):
            super().apply(
                output,
                hidden_states,
                w1,
                w2,
                topk_weights,
                topk_ids,
                *args,
                **kwargs,
            )
