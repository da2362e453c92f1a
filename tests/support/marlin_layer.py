# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""One layer on stock's Marlin kernel, with all experts resident and from slots.

The GEMM is a stand-in that splits each product by the place of its block among all, as
Marlin does. So blocks in another order would have other bits.
"""

from dataclasses import dataclass

import pytest
import torch
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.experts import marlin_moe
from vllm.model_executor.layers.fused_moe.experts.marlin_moe import MarlinExperts
from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import make_wna16_moe_kernel
from vllm.scalar_type import ScalarType, scalar_types
from vllm.v1.worker import workspace

from tests.support import cuda_library
from vllm import _custom_ops as ops
from vllm.model_executor.layers.fused_moe import config as moe_config
from vllm.model_executor.layers.fused_moe.expert_slots.backend import on_rows
from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchConfig
from vllm.model_executor.layers.fused_moe.expert_slots.cpu.memory import CPUMemory
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.manager import (
    CudaSlotManager,
)
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.marlin_experts import (
    SlottedMarlinExperts,
    mapping_blocks,
)
from vllm.model_executor.layers.fused_moe.expert_slots.weights.host_pages import (
    host_tensor,
)
from vllm.model_executor.layers.fused_moe.expert_slots.weights.rows import ExpertRows
from vllm.model_executor.layers.fused_moe.expert_slots.weights.store import ExpertStore

HIDDEN, WIDTH, GROUP, TOP_K = 64, 32, 32, 3
NIBBLES = torch.arange(0, 32, 4)
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
RUBBISH = torch.tensor([2**31 - 1, -(2**31), -1, 3, 0x7FC00000, -7, 99_999])
"""What uninitialised memory may hold, as int32."""

gemms: list[tuple] = []
"""What the GEMM was handed: ids and the blocks in use."""


def align(topk_ids, num_experts, block_size, sorted_ids, expert_ids, num_padded, *more):
    """The stand-in, with rubbish behind the last block in use."""
    cuda_library.align(
        topk_ids, num_experts, block_size, sorted_ids, expert_ids, num_padded, *more
    )
    rest = expert_ids[int(num_padded) // block_size :]
    rest.copy_(RUBBISH.repeat(len(rest) // len(RUBBISH) + 1)[: len(rest)])


def dequantised(weight, scale, zeros, global_scale, kind) -> torch.Tensor:
    """One expert's [in / 16, 2 * out] int32 as float32 [in, out]. The stand-in keeps
    the weights in their order; Marlin's own shuffles them."""
    size_k, size_n = len(weight) * 16, weight.shape[1] // 2
    packed = weight.reshape(size_k // 8, 1, size_n)
    values = (packed >> NIBBLES.view(1, 8, 1) & 15).reshape(size_k, size_n)
    if kind == scalar_types.float4_e2m1f:
        values = E2M1[values & 7] * (1 - 2 * (values >> 3))
    elif kind == scalar_types.uint4:
        unpacked = (zeros[..., None] >> NIBBLES & 15).reshape(len(zeros), size_n)
        values = values - unpacked.repeat_interleave(GROUP, 0)
    else:
        values = values - 8
    values = values.float() * scale.float().repeat_interleave(GROUP, 0)
    return values if global_scale is None else values * global_scale


def gemm(
    x, out, weight, bias, scale, _, global_scale, zeros, __, rows, blocks, padded, gate,
    *, moe_block_size, top_k, mul_topk_weights, b_q_type, size_m, size_k, **more,
):  # fmt: skip
    """`moe_wna16_marlin_gemm`, block after block."""
    used = int(padded) // moe_block_size
    gemms.append((moe_block_size, rows.clone(), blocks[:used].clone(), int(padded)))
    for place, expert in enumerate(blocks[:used].tolist()):
        if expert == -1:
            continue
        assert 0 <= expert < len(weight)
        ids = rows[place * moe_block_size : (place + 1) * moe_block_size]
        ids = ids[ids < size_m * top_k].long()
        mine = (None if t is None else t[expert] for t in (zeros, global_scale))
        values = dequantised(weight[expert], scale[expert], *mine, b_q_type)
        its, split = x[ids // top_k].float(), size_k * (place + 1) // (used + 1)
        y = its[:, :split] @ values[:split] + its[:, split:] @ values[split:]
        y = y if bias is None else y + bias[expert].float()
        y = y * gate.flatten()[ids, None] if mul_topk_weights else y
        out.view(size_m * top_k, -1)[ids] = y.to(out.dtype)
    return out


def stand_in_for_marlin(monkeypatch: pytest.MonkeyPatch) -> None:
    """And puts our hook in its place."""
    cuda_library.stand_in_for_cuda_library(monkeypatch)
    monkeypatch.setattr(ops, "moe_align_block_size", align)
    monkeypatch.setattr(ops, "moe_wna16_marlin_gemm", gemm)
    monkeypatch.setattr(marlin_moe, "get_marlin_workspace", lambda device: None)
    stock = marlin_moe.moe_align_block_size
    monkeypatch.setattr(marlin_moe, "moe_align_block_size", mapping_blocks(stock))
    gemms.clear()


@dataclass
class Layer:
    """A quantised layer of random weights, with all experts resident and from slots:
    "int4", "zeros" (zero points and biases), or "nvfp4" (a scale of each expert)."""

    kind: str
    slots: int
    experts: int = 16
    expert_map: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if not workspace.is_workspace_manager_initialized():
            workspace.init_workspace_manager(torch.device("cpu"))
        self.generator = torch.Generator().manual_seed(0)
        self.model_experts = (
            self.experts if self.expert_map is None else len(self.expert_map)
        )
        self.tensors = {}
        for name, size_k, size_n in (("w1", HIDDEN, 2 * WIDTH), ("w2", WIDTH, HIDDEN)):
            self.tensors[name] = self.words(size_k // 16, 2 * size_n)
            scale = self.normal(self.experts, size_k // GROUP, size_n).abs() / 8
            self.tensors[f"{name}_scale"] = scale.half()
            if self.kind == "zeros":
                self.tensors[f"{name}_zp"] = self.words(size_k // GROUP, size_n // 8)
                self.tensors[f"{name}_bias"] = self.normal(self.experts, size_n).half()
            if self.kind == "nvfp4":
                alphas = f"g{name[1]}_alphas"
                self.tensors[alphas] = self.normal(self.experts).abs() + 0.5
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
        rows = ExpertRows(ExpertStore(homes), self.slots, CPUMemory())
        for name, parameter in self.parameters.items():
            parameter.data = rows.tensors[name]
        self.manager = CudaSlotManager(
            MoEPrefetchConfig(slots=self.slots), rows, expert_map=self.expert_map
        )
        impl = self.kernels["slots"].impl
        impl.fused_experts = on_rows(
            impl.fused_experts, SlottedMarlinExperts, self.manager
        )

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator) * 0.2

    def words(self, *shape: int) -> torch.Tensor:
        low, high = -(2**31), 2**31
        shape = (self.experts, *shape)
        return torch.randint(low, high, shape, generator=self.generator).int()

    def _kernel(self, tensors):
        config = moe_config.FusedMoEConfig(
            num_experts=self.model_experts,
            experts_per_token=TOP_K,
            hidden_dim=HIDDEN,
            intermediate_size=WIDTH,
            num_local_experts=self.experts,
            num_logical_experts=self.model_experts,
            activation=MoEActivation.SILU,
            device="cpu",
            routing_method=moe_config.RoutingMethodType.Renormalize,
            moe_parallel_config=moe_config.FusedMoEParallelConfig.make_no_parallel(),
            in_dtype=torch.float16,
        )
        scales = {name: t for name, t in tensors.items() if "_" in name}
        make = (
            moe_config.nvfp4_w4a16_moe_quant_config
            if self.kind == "nvfp4"
            else moe_config.int4_w4a16_moe_quant_config
        )
        return make_wna16_moe_kernel(make(**scales), config, MarlinExperts)

    def batch(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scores = torch.rand(tokens, self.model_experts, generator=self.generator)
        weights, ids = scores.topk(TOP_K)
        return self.normal(tokens, HIDDEN).half(), weights, ids.int()

    def run(self, kernel: str, x, weights, ids) -> torch.Tensor:
        tensors = self.tensors if kernel == "stock" else self.parameters
        return self.kernels[kernel].apply(
            hidden_states=x,
            w1=tensors["w1"],
            w2=tensors["w2"],
            topk_weights=weights,
            topk_ids=ids,
            activation=MoEActivation.SILU,
            global_num_experts=self.model_experts,
            expert_map=self.expert_map,
            apply_router_weight_on_input=False,
        )

    def reference(self, x, weights, ids) -> torch.Tensor:
        """By plain products in float32, without alignment or kernel."""
        experts = self.kernels["stock"].fused_experts
        kind = ScalarType.from_id(experts.quant_type_id)
        out = torch.zeros(len(x), HIDDEN)
        for token, place in (ids >= 0).nonzero().tolist():
            expert = ids[token, place]
            y = x[token].float()
            for name in ("w1", "w2"):
                values = dequantised(
                    *(
                        None if t is None else t[expert]
                        for t in (
                            self.tensors[name],
                            self.tensors[f"{name}_scale"],
                            self.tensors.get(f"{name}_zp"),
                            self.tensors.get(f"g{name[1]}_alphas"),
                        )
                    ),
                    kind,
                )
                y = y @ values
                if (bias := self.tensors.get(f"{name}_bias")) is not None:
                    y = y + bias[expert]
                if name == "w1":
                    y = torch.nn.functional.silu(y[:WIDTH]) * y[WIDTH:]
            out[token] += y * weights[token, place]
        return out
