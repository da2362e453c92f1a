# SPDX-License-Identifier: Apache-2.0
"""Stock's Triton fused-MoE kernel over slots on a GPU, in as many waves as a step takes.

Results equal full residency bit for bit, because nothing about a row's arithmetic changes:

* the kernel configuration is that of all E experts, not of the N slots that its lookup would see;
* the waves write their rows (token, k) into one shared intermediate, and the sum over k runs once,
  at the end, in stock's order.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
from vllm.model_executor.layers.fused_moe.fused_moe import (
    invoke_fused_moe_triton_kernel,
    try_get_optimal_moe_config,
)
from vllm.model_executor.layers.fused_moe.moe_align_block_size import moe_align_block_size
from vllm.triton_utils import tl

from vllm.model_executor.layers.fused_moe import override_config
from vllm.model_executor.layers.fused_moe.expert_slots.device_slots import (
    DeviceSlotManager,
    DeviceStep,
)
from vllm.model_executor.layers.fused_moe.expert_slots.rank_map import RankMap
from vllm.model_executor.layers.fused_moe.expert_slots.versions import reduces_by_hook

_COMPUTE_TYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
}


class SlottedTritonExperts(TritonExperts):
    """`TritonExperts` whose weights are slots. Unquantised weights in bf16, fp16 or fp32.

    Attributes:
        slots: the layer's manager, set once its slots are made.
        rank_map: under expert parallelism, which experts are this rank's.
    """

    slots: DeviceSlotManager | None = None
    rank_map: RankMap | None = None

    def workspace_shapes(
        self, M: int, N: int, K: int, topk: int, *args: Any, **kwargs: Any
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Stock's, but with both GEMMs' outputs apart: a later wave's first GEMM must not overwrite
        an earlier wave's second."""
        workspace13, _, output = super().workspace_shapes(M, N, K, topk, *args, **kwargs)
        return workspace13, (M, topk, N + K), output

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
        a1q_scale: torch.Tensor | None,
        a2_scale: torch.Tensor | None,
        workspace13: torch.Tensor,
        workspace2: torch.Tensor,
        expert_tokens_meta: Any,
        apply_router_weight_on_input: bool,
    ) -> None:
        """Plans, loads and computes one step of the layer.

        Args:
            output: [tokens, hidden]; as all other arguments, what stock's `apply` gets.
            w1, w2: the slots, [N, 2 * width, hidden] and [N, hidden, width].
            topk_ids: [tokens, top_k] int32, expert ids 0 ... E-1, or under expert parallelism ids
                of the whole model.
            expert_map: stock's, under expert parallelism; `rank_map` holds the same.
        """
        assert self.slots is not None and a1q_scale is None
        assert (expert_map is None) == (self.rank_map is None)
        experts = self.slots.num_experts
        config = try_get_optimal_moe_config(
            (experts, *w1.shape[1:]),
            (experts, *w2.shape[1:]),
            topk_ids.shape[1],
            self.quant_config.config_name(hidden_states.dtype),
            hidden_states.shape[0],
            block_shape=self.block_shape,
        )
        here = topk_ids if self.rank_map is None else self.rank_map.experts_here(topk_ids)
        step = self.slots.plan(here, _is_padding())
        self.slots.load(0)
        if step.slot_ids is not None:
            ids, num_ids, table = step.slot_ids, self.slots.num_slots, None
            if self.rank_map is not None:
                ids, num_ids = topk_ids, global_num_experts
                table = self.rank_map.slots_of_all(step.guarded_tables[0])
            with override_config(config):
                super().apply(
                    output,
                    hidden_states,
                    w1,
                    w2,
                    topk_weights,
                    ids,
                    activation,
                    num_ids,
                    table,
                    None,
                    a2_scale,
                    workspace13,
                    workspace2,
                    expert_tokens_meta,
                    apply_router_weight_on_input,
                )
            return

        assert not reduces_by_hook(self)
        tokens, top_k = topk_ids.shape
        rows, width, hidden = tokens * top_k, w1.shape[1], w2.shape[1]
        scratch = workspace2.flatten()
        gate_up = scratch[: rows * width].view(tokens, top_k, width)
        down = scratch[rows * width : rows * (width + hidden)].view(tokens, top_k, hidden)
        act_width = self.adjust_N_for_activation(width, activation)
        activated = workspace13.flatten()[: rows * act_width].view(rows, act_width)

        def gemm(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, **options: Any) -> None:
            invoke_fused_moe_triton_kernel(
                a,
                b,
                c,
                None,
                None,
                topk_weights if options["mul_routed_weight"] else None,
                *assignment,
                config=config,
                compute_type=_COMPUTE_TYPES[hidden_states.dtype],
                use_fp8_w8a8=False,
                use_int8_w8a8=False,
                use_int8_w8a16=False,
                use_int4_w4a16=False,
                per_channel_quant=False,
                **options,
            )

        num_ids = experts if self.rank_map is None else global_num_experts
        for guarded_table in self._waves(step):
            table = guarded_table[1:]
            if self.rank_map is not None:
                table = self.rank_map.slots_of_all(guarded_table)
            assignment = moe_align_block_size(
                topk_ids, config["BLOCK_SIZE_M"], num_ids, table, ignore_invalid_experts=True
            )
            gemm(
                hidden_states,
                w1,
                gate_up,
                mul_routed_weight=apply_router_weight_on_input,
                top_k=top_k,
                B_bias=self.w1_bias,
            )
            self.activation(activation, activated, gate_up.view(rows, width))
            gemm(
                activated,
                w2,
                down,
                mul_routed_weight=not apply_router_weight_on_input,
                top_k=1,
                B_bias=self.w2_bias,
            )
        self.moe_sum(down, output, topk_ids, expert_map)

    def _waves(self, step: DeviceStep) -> Iterator[torch.Tensor]:
        """Yields each wave's guarded table, once its experts are loaded or on their way. Wave
        w+1 loads into the half of the ring that wave w-1 used, while wave w computes."""
        assert self.slots is not None
        yield step.guarded_tables[0]
        self.slots.load(1)  # into slots that the first wave computed from
        side = _LoadStream(step.guarded_tables.device)
        for wave in range(1, step.waves):
            if wave + 1 < step.waves:
                with side.after_all_so_far():
                    self.slots.load(wave + 1)
            yield step.guarded_tables[wave]
            side.join()


class _LoadStream:
    """The stream that loads while the current one computes; on the CPU, none."""

    def __init__(self, device: torch.device):
        self._stream = _load_stream(device) if device.type == "cuda" else None

    def after_all_so_far(self) -> AbstractContextManager[Any]:
        """Work within runs beside what the current stream gets from here on."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self._stream)

    def join(self) -> None:
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)


@cache
def _load_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _is_padding() -> torch.Tensor | None:
    """The step's mask of padding rows, [tokens] bool, where vLLM keeps one."""
    if not is_forward_context_available():
        return None
    return getattr(get_forward_context(), "is_padding", None)
