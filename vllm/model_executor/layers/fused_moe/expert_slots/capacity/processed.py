# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The bytes of an expert after stock has processed it: packed, padded, with other
scales than in the checkpoint. Stock's own code processes a few experts of ones."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from vllm import _custom_ops
from vllm.model_executor.layers.fused_moe.expert_slots.replacing import replaced
from vllm.model_executor.layers.fused_moe.expert_slots.weights.bundle import (
    FEW,
    Bundle,
    few_experts,
)

Rows = tuple[tuple[str, int], ...]
"""Names of a layer's per-expert tensors, and the bytes of one expert in each."""


def processed_rows(layer: RoutedExperts, known: dict[Any, Rows]) -> Rows:
    """What one expert of a layer takes in each tensor once it has been processed.

    Args:
        layer: stock's, with its parameters on the meta device. It is used up.
        known: of layers that were asked for before; is added to. Layers of a model are
            alike.

    Raises:
        MoEPrefetchError: the layer keeps tensors that slots cannot follow.
    """
    method: Any = layer.quant_method
    key = (
        type(method),
        getattr(method, "experts_cls", None),
        tuple(
            (name, p.shape, p.dtype)
            for name, p in layer.named_parameters(recurse=False)
        ),
    )
    if key not in known:
        cpu = torch.device("cpu")
        with cpu, _shapes_alone(), few_experts(layer, cpu):
            method.process_weights_after_loading(layer)
            bundle = Bundle.of(layer, FEW)
        known[key] = tuple((name, t[0].nbytes) for name, t in bundle.tensors().items())
    return known[key]


@contextmanager
def _shapes_alone() -> Iterator[None]:
    """Within, vLLM's operators that prepare weights on a GPU give tensors of the right
    shape and of no content: they exist nowhere else."""
    with ExitStack() as stack:
        for name, shaped in _SHAPED.items():
            stack.enter_context(replaced(_custom_ops, name, shaped))
        yield


def _repacked(
    b_q_weight: torch.Tensor,
    size_k: int,
    size_n: int,
    num_bits: int,
    *_: Any,
    **__: Any,
) -> torch.Tensor:
    """Marlin's tiles of 16 rows: [..., size_k / 16, size_n * num_bits / 2]."""
    shape = (*b_q_weight.shape[:-2], size_k // 16, size_n * num_bits // 2)
    return torch.empty(shape, dtype=b_q_weight.dtype)


def _scaled_fp8(
    values: torch.Tensor, scale: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(values, dtype=torch.float8_e4m3fn), scale


_SHAPED: dict[str, Any] = {
    "gptq_marlin_repack": _repacked,
    "awq_marlin_repack": _repacked,
    "gptq_marlin_moe_repack": _repacked,
    "awq_marlin_moe_repack": _repacked,
    "scaled_fp8_quant": _scaled_fp8,
}
