# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Stock's Triton fused-MoE kernel over permuted rows.

Results equal full residency bit for bit, because the kernel is called as stock calls
it, on tensors of stock's shape. Configuration, block sizes and shortcuts are stock's,
and the arithmetic of a token does not depend on the row that its expert lies in.
"""

from typing import Any

import torch
import vllm.envs as envs
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

from vllm.model_executor.layers.fused_moe.expert_slots.cuda.manager import (
    CudaSlotManager,
)


class SlottedTritonExperts(TritonExperts):
    """`TritonExperts` whose weights are rows. Unquantised weights only.

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
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Decides, loads and computes one step of the layer. Takes what stock's `apply`
        takes.

        Under expert parallelism stock's kernel gets the ids unchanged. In the place of
        its expert map it gets the map from the model's experts to rows, so that it
        aligns tokens as in stock.
        """
        assert self.slot_manager is not None
        rows = self.slot_manager.step(topk_ids, _padding(len(topk_ids)))
        if expert_map is None:
            topk_ids = rows
        else:
            expert_map = rows
        super().apply(
            output,
            hidden_states,
            w1,
            w2,
            topk_weights,
            topk_ids,
            activation,
            global_num_experts,
            expert_map,
            *args,
            **kwargs,
        )


def _padding(num_tokens: int) -> torch.Tensor | None:
    """The step's mask of padding rows, [tokens] bool, if stock's routers use it too.
    Otherwise it may still be as the capture of a graph left it, all true."""
    if not (envs.VLLM_MOE_SKIP_PADDING and is_forward_context_available()):
        return None
    mask = getattr(get_forward_context(), "is_padding", None)
    return None if mask is None else mask[:num_tokens]
