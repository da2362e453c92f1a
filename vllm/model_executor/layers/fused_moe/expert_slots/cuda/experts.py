# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Stock's Triton fused-MoE kernels over permuted rows.

Results equal full residency bit for bit, because the kernel is called as stock calls
it, on tensors of stock's shape. Configuration, block sizes and shortcuts are stock's,
and the arithmetic of a token does not depend on the row that its expert lies in. The
kernel reads weights, scales, zero points and biases by the same row, so all tensors of
an expert must be rows. A tensor with one value for all experts stays as it is.
"""

from typing import TYPE_CHECKING, Any

import torch
import vllm.envs as envs
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

from vllm.model_executor.layers.fused_moe.expert_slots.cuda.manager import (
    CudaSlotManager,
)

if TYPE_CHECKING:
    _Stock = TritonExperts
else:
    _Stock = object

TRITON_EXPERTS_CLASSES = {
    "TritonExperts",
    "TritonWNA16Experts",
    "Nvfp4QuantizationEmulationTritonExperts",
}
"""Stock's kernels that are known to give the same bits on permuted rows."""


class SlottedExperts(_Stock):
    """Runs one of stock's classes on rows; `backend.on_rows` mixes it in.

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
        padding = (
            None if self._one_scale_for_all_tokens else padding_of_step(len(topk_ids))
        )
        rows = self.slot_manager.step(topk_ids, padding)
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

    @property
    def _one_scale_for_all_tokens(self) -> bool:
        """Whether the kernel scales its intermediate by the largest value of all
        tokens. Then a row of padding changes the bits of real tokens, so its experts
        are loaded as well, if the router names any."""
        return (
            self.quant_dtype in (torch.int8, torch.float8_e4m3fn)
            and self.a2_scale is None
            and self.block_shape is None
            and not self.per_act_token_quant
        )


def padding_of_step(num_tokens: int) -> torch.Tensor | None:
    """The step's mask of padding rows, [tokens] bool, if stock's routers use it too.
    Otherwise it may still be as the capture of a graph left it, all true."""
    if not (envs.VLLM_MOE_SKIP_PADDING and is_forward_context_available()):
        return None
    mask = getattr(get_forward_context(), "is_padding", None)
    return None if mask is None else mask[:num_tokens]
