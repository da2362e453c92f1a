# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Stock's fused-MoE kernels of the CPU platform over permuted rows.

Only the call of the kernel is ours. What stock does around it (weights applied to the
input, shared experts) is unchanged and traced as before, so compiled code is the same.
"""

from typing import TYPE_CHECKING, Any

import torch
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import (
    LayerNameType,
    _encode_layer_name,
    _resolve_layer_name,
    direct_register_custom_op,
)

from vllm.model_executor.layers.fused_moe.expert_slots.backend import SlotManager
from vllm.model_executor.layers.fused_moe.expert_slots.versions import moe_op_tags

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import (
        CPUUnquantizedExperts as _Stock,
    )
else:
    _Stock = object

CPU_EXPERTS_CLASSES = {
    "CPUUnquantizedExperts",
    "X86CPUUnquantizedExperts",
    "ArmCPUUnquantizedExperts",
    "PowerCPUUnquantizedExperts",
    "CPUExpertsFp8",
    "CPUExpertsInt8",
    "CPUExpertsInt4",
    "CPUExpertsMxfp4",
}
"""Stock's kernels of the CPU platform that are known to run on remapped expert ids and
to give the same bits."""


class SlottedCPUExperts(_Stock):
    """Runs one of stock's classes on rows; `backend.on_rows` mixes it in.

    Attributes:
        slot_manager: the layer's manager, set once its rows are made.
        layer: the layer, a `RoutedExperts`: its parameters are the rows.
    """

    slot_manager: SlotManager | None = None
    layer: Any = None

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
        takes. Weights and options are read from the layer, because the opaque op has no
        arguments for them."""
        if torch.compiler.is_compiling():
            name = _encode_layer_name(self.layer.layer_name)
            torch.ops.vllm.moe_expert_slots(
                output, hidden_states, topk_weights, topk_ids, name
            )
        else:
            self.run_step(output, hidden_states, topk_weights, topk_ids)

    def run_step(
        self,
        output: torch.Tensor,
        hidden_states: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
    ) -> None:
        """As `apply`, outside of traced code.

        Args:
            output: [tokens, hidden], written.
            hidden_states: [tokens, hidden].
            topk_weights: [tokens, top_k] float32.
            topk_ids: [tokens, top_k] int32, expert ids of this rank.
        """
        assert self.slot_manager is not None
        super().apply(
            output=output,
            hidden_states=hidden_states,
            w1=self.layer.w13_weight,
            w2=self.layer.w2_weight,
            topk_weights=topk_weights,
            topk_ids=self.slot_manager.step(topk_ids),
            activation=self.layer.activation,
            global_num_experts=self.layer.global_num_experts,
            expert_map=None,
            a1q_scale=None,
            a2_scale=None,
            workspace13=output,  # not used: these kernels allocate their own
            workspace2=output,
            expert_tokens_meta=None,
            apply_router_weight_on_input=self.layer.apply_router_weight_on_input,
        )


def _moe_expert_slots(
    output: torch.Tensor,
    hidden_states: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    layer_name: LayerNameType,
) -> None:
    layers = get_forward_context().no_compile_layers
    layer = layers[_resolve_layer_name(layer_name)].routed_experts
    layer.quant_method.moe_kernel.fused_experts.run_step(
        output, hidden_states, topk_weights, topk_ids
    )


def _moe_expert_slots_fake(
    output: torch.Tensor,
    hidden_states: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    layer_name: LayerNameType,
) -> None:
    return


direct_register_custom_op(
    op_name="moe_expert_slots",
    op_func=_moe_expert_slots,
    mutates_args=["output"],
    fake_impl=_moe_expert_slots_fake,
    tags=moe_op_tags(),
)
