# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What multi-head latent attention (MLA) takes beside its parameters."""

import torch
from vllm.model_executor.layers.attention.mla_attention import MLAAttention
from vllm.model_executor.layers.linear import UnquantizedLinearMethod


def mla_layers(model: torch.nn.Module) -> list[MLAAttention]:
    return [module for module in model.modules() if isinstance(module, MLAAttention)]


def projection_bytes(layer: MLAAttention, dtype: torch.dtype) -> int:
    """Bytes of `kv_b_proj` in `dtype`, which vLLM makes beside a quantised one for as
    long as it serves; 0 if it is not quantised."""
    method = getattr(layer.kv_b_proj, "quant_method", None)
    if method is None or isinstance(method, UnquantizedLinearMethod):
        return 0
    return layer.kv_lora_rank * _outputs(layer) * dtype.itemsize


def context_bytes(layer: MLAAttention, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of a prompt's earlier chunks, as many as vLLM
    computes at a time. It makes them in its profile run, before it sizes the KV
    cache."""
    return layer.chunked_prefill_workspace_size * _outputs(layer) * dtype.itemsize


def _outputs(layer: MLAAttention) -> int:
    """Of `kv_b_proj`: keys without their rotary part, and values, of every head."""
    return layer.num_heads * (layer.qk_nope_head_dim + layer.v_head_dim)
