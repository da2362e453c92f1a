# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Memory that cannot be read off a model and is estimated: intermediates and CUDA
graphs (docs/sizing.md)."""

from typing import Any

from vllm.config import VllmConfig

_LAYER_TENSORS = 8
"""Tensors of the hidden size that a layer holds around its expert GEMMs, about."""

_SAMPLER_BYTES = 20
"""Bytes that the sampler takes for an entry of the logits: the logits in two
precisions, probabilities, and their sorted copy with indices."""

_GRAPH_BYTES_PER_LAYER = 384 << 10
"""Bytes that a layer takes of one captured CUDA graph: 24 MiB for a graph of 64 layers,
as measured in vLLM issue 50780."""


def activation_bytes(
    vllm_config: VllmConfig, layers: list[Any], context_bytes: int = 0
) -> int:
    """Bytes of the intermediates of the largest batch: one layer's and the sampler's.

    A layer holds the input and output of both expert GEMMs for every (token, k), and
    some tensors around them; or, before that, the context of MLA. Torch keeps what
    either of layer and sampler has freed, in blocks that may not serve the other, so
    the two add up.

    Args:
        layers: the `RoutedExperts` of one rank.
        context_bytes: of `mla.context_bytes`, of the layer that has the most.
    """
    model_config, scheduler = vllm_config.model_config, vllm_config.scheduler_config
    dtype: Any = model_config.dtype  # vLLM has settled it
    hidden, width = model_config.get_hidden_size(), dtype.itemsize
    routed = max(
        (
            layer.top_k
            * (3 * layer.moe_config.intermediate_size_per_partition + hidden)
            for layer in layers
        ),
        default=0,
    )
    entries = scheduler.max_num_batched_tokens * (routed + _LAYER_TENSORS * hidden)
    logits = scheduler.max_num_seqs * model_config.get_vocab_size()
    return max(entries * width, context_bytes) + logits * _SAMPLER_BYTES


def rows_per_sequence(vllm_config: VllmConfig) -> int:
    """Rows that one decoding sequence has in a step: its own, and those of
    speculation."""
    speculation = vllm_config.speculative_config
    return 1 + (speculation.num_speculative_tokens if speculation else 0)


def graph_bytes(vllm_config: VllmConfig) -> int:
    """Bytes of CUDA graphs. vLLM captures every size once for each mode, and the sizes
    that hold more than decoding sequences in the piecewise mode only."""
    compilation, scheduler = (
        vllm_config.compilation_config,
        vllm_config.scheduler_config,
    )
    mode, sizes = compilation.cudagraph_mode, compilation.cudagraph_capture_sizes or []
    if not mode:
        return 0
    most = scheduler.max_num_seqs * rows_per_sequence(vllm_config)
    decoding = sum(size <= most for size in sizes)
    captured = len(sizes) if mode.mixed_mode() else 0
    if mode.separate_routine():
        captured += decoding
    layers = vllm_config.model_config.get_num_layers(vllm_config.parallel_config)
    return captured * layers * _GRAPH_BYTES_PER_LAYER
