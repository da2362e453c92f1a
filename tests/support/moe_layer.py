# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""One MoE layer twice, as vLLM's modular kernel runs it: with all experts resident, and
from slots. The kernels run in Triton's interpreter; its bfloat16 is wrong, so float32
and float16 alone. Quantised weights are as in `moe_formats`."""

from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.all2all_utils import (
    maybe_make_prepare_finalize,
)
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
    FusedMoEQuantConfig,
    RoutingMethodType,
    biased_moe_quant_config,
)
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
from vllm.v1.worker.workspace import (
    init_workspace_manager,
    is_workspace_manager_initialized,
)

from tests.support.cuda_library import activate
from tests.support.moe_formats import Format
from vllm.model_executor.layers.fused_moe import modular_kernel
from vllm.model_executor.layers.fused_moe.expert_slots.backend import on_rows
from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchConfig
from vllm.model_executor.layers.fused_moe.expert_slots.cpu.memory import CPUMemory
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.experts import (
    SlottedExperts,
)
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.manager import (
    CudaSlotManager,
)
from vllm.model_executor.layers.fused_moe.expert_slots.weights.host_pages import (
    host_tensor,
)
from vllm.model_executor.layers.fused_moe.expert_slots.weights.memory import Memory
from vllm.model_executor.layers.fused_moe.expert_slots.weights.rows import ExpertRows
from vllm.model_executor.layers.fused_moe.expert_slots.weights.store import ExpertStore

HIDDEN, WIDTH = 64, 32


@dataclass
class Layer:
    """A layer of random weights. `expert_map` ([model's experts] int32) makes it one
    rank's.

    Attributes:
        tensors: what belongs to an expert, name -> [E, ...], all experts.
        parameters: the same names; the rows that the slots are part of.
        floats: the weights and biases that `tensors` stand for, in float32.
    """

    slots: int
    experts: int = 16
    top_k: int = 3
    activation: MoEActivation = MoEActivation.SILU
    dtype: torch.dtype = torch.float32
    bias: bool = False
    weight_on_input: bool = False
    policy: str = "lru"
    expert_map: torch.Tensor | None = None
    seed: int = 0
    memory: Memory = field(default_factory=CPUMemory)
    quant: Format | None = None
    hidden: int = HIDDEN
    width: int = WIDTH

    def __post_init__(self) -> None:
        if not is_workspace_manager_initialized():
            init_workspace_manager(torch.device("cpu"))
        self.generator = torch.Generator().manual_seed(self.seed)
        up = self.width * (2 if self.activation.is_gated else 1)
        self.tensors, self.floats = {}, {}
        self._add_weight("w13", up, self.hidden)
        self._add_weight("w2", self.hidden, self.width)
        if self.bias:
            self._add_bias("w13_bias", up)
            self._add_bias("w2_bias", self.hidden)
        homes = {
            n: host_tensor(t.shape, t.dtype).copy_(t) for n, t in self.tensors.items()
        }
        self.parameters = {
            name: torch.nn.Parameter(t.clone(), requires_grad=False)
            for name, t in self.tensors.items()
        }
        self.kernels = {
            "stock": self._kernel(self.tensors),
            "slots": self._kernel(self.parameters),
        }
        rows = ExpertRows(ExpertStore(homes), self.slots, self.memory)
        for name, parameter in self.parameters.items():
            parameter.data = rows.tensors[name]
        config = MoEPrefetchConfig(slots=self.slots, policy=self.policy)
        self.manager = CudaSlotManager(config, rows, expert_map=self.expert_map)
        impl = self.kernels["slots"].impl
        impl.fused_experts = on_rows(impl.fused_experts, SlottedExperts, self.manager)

    def normal(self, *shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=self.generator) * 0.2).to(self.dtype)

    def _add_weight(self, role: str, out: int, inner: int) -> None:
        weight = self.normal(self.experts, out, inner)
        if self.quant is None:
            self.tensors[f"{role}_weight"] = weight
            self.floats[f"{role}_weight"] = weight.float()
            return
        # No two experts are of one size, so a scale of another expert is noticed.
        size = torch.linspace(0.5, 2, self.experts)[:, None, None]
        parts, meant = self.quant.pack(weight.float() * size)
        self.tensors |= {f"{role}_{suffix}": part for suffix, part in parts.items()}
        self.floats[f"{role}_weight"] = meant

    def _add_bias(self, name: str, out: int) -> None:
        self.tensors[name] = self.normal(self.experts, out)
        self.floats[name] = self.tensors[name].float()

    @property
    def model_experts(self) -> int:
        return self.experts if self.expert_map is None else len(self.expert_map)

    def _kernel(self, tensors: dict[str, Any]) -> Any:
        config = FusedMoEConfig(
            num_experts=self.model_experts,
            experts_per_token=self.top_k,
            hidden_dim=self.hidden,
            intermediate_size=self.width,
            num_local_experts=self.experts,
            num_logical_experts=self.model_experts,
            activation=self.activation,
            device="cpu",
            routing_method=RoutingMethodType.Renormalize,
            moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
            in_dtype=self.dtype,
            has_bias=self.bias,
        )
        quant = self._quant_config(tensors)
        experts_cls = self.quant.experts_cls if self.quant else TritonExperts
        return modular_kernel.FusedMoEKernel(
            maybe_make_prepare_finalize(
                moe=config, quant_config=quant, allow_new_interface=True
            ),
            experts_cls(moe_config=config, quant_config=quant),
        )

    def _quant_config(self, tensors: dict[str, Any]) -> FusedMoEQuantConfig:
        if self.quant is not None:
            return self.quant.config(tensors)
        uninterleaved = self.activation is MoEActivation.SWIGLUOAI_UNINTERLEAVE
        options = {"gemm1_clamp_limit": 7.0} if uninterleaved else {}
        if self.bias:
            return biased_moe_quant_config(
                tensors["w13_bias"], tensors["w2_bias"], **options
            )
        return FusedMoEQuantConfig.make(**options)

    def batch(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Hidden states [tokens, hidden], router's weights and ids [tokens, top_k]."""
        scores = torch.rand(tokens, self.model_experts, generator=self.generator)
        weights, ids = scores.topk(self.top_k)
        return self.normal(tokens, self.hidden), weights, ids.to(torch.int32)

    def run(
        self, kernel: str, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
    ) -> torch.Tensor:
        """The layer's output, [tokens, hidden], by the kernel "stock" or "slots". The
        workspaces start as rubbish."""
        tensors = self.tensors if kernel == "stock" else self.parameters
        return self.kernels[kernel].apply(
            hidden_states=x,
            w1=tensors["w13_weight"],
            w2=tensors["w2_weight"],
            topk_weights=weights,
            topk_ids=ids,
            activation=self.activation,
            global_num_experts=self.model_experts,
            expert_map=self.expert_map,
            apply_router_weight_on_input=self.weight_on_input,
        )

    def reference(
        self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
    ) -> torch.Tensor:
        """The same by plain matrix products in float32, without a kernel. Activations
        are not quantised."""
        out = torch.zeros(len(x), self.hidden)
        w = self.floats
        for token, (its_weights, its_ids) in enumerate(
            zip(weights, ids.tolist(), strict=True)
        ):
            for weight, expert in zip(its_weights, its_ids, strict=True):
                if self.expert_map is not None and expert >= 0:
                    expert = self.expert_map[expert].item()
                if expert < 0:
                    continue
                row = x[token].float() * (weight if self.weight_on_input else 1)
                up = w["w13_weight"][expert] @ row
                up = up + (w["w13_bias"][expert] if self.bias else 0)
                hidden = torch.empty(self.width)
                activate(self.activation, hidden, up)
                down = w["w2_weight"][expert] @ hidden + (
                    w["w2_bias"][expert] if self.bias else 0
                )
                out[token] += down * (1 if self.weight_on_input else weight)
        return out
