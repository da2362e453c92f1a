# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""All that differs between the supported versions of vLLM, and nothing else. Each
branch of `if VLLM_0_33` is checked against the sources of its version."""

from typing import Any

import torch
from packaging.version import Version

import vllm

VLLM_0_33 = Version(vllm.__version__) >= Version("0.33.0.dev0")


def moe_op_tags() -> tuple[torch.Tag, ...]:
    """The tag of vLLM's own opaque MoE op. Inductor lays out the inputs by it."""
    if VLLM_0_33:
        return (torch.Tag.needs_exact_strides,)
    return (torch.Tag.needs_fixed_stride_order,)


def keep_routing_apart(moe_config: Any) -> None:
    """Rules out kernels that route by themselves. On 0.32 this does nothing: there, the
    caller names a backend that does not."""
    if VLLM_0_33:
        moe_config.require_decomposed_backend = True


def kv_cache_bytes(vllm_config: Any, specs: dict[str, Any]) -> tuple[int, int]:
    """Bytes of KV cache of one sequence of `max_model_len`, and of one block, as vLLM's
    own check at start-up counts them. On 0.33 the platform and the model group the
    layers."""
    if VLLM_0_33:
        from vllm.v1.core.kv_cache_config_builder import get_kv_cache_config_builder
        from vllm.v1.core.kv_cache_planning import (
            _max_memory_usage_bytes_from_groups,
            _pool_bytes_per_block_from_builder,
            get_kv_cache_groups_from_builder,
        )

        builder = get_kv_cache_config_builder(vllm_config)
        groups = get_kv_cache_groups_from_builder(builder, vllm_config, specs)
        return (
            _max_memory_usage_bytes_from_groups(builder, vllm_config, groups),
            _pool_bytes_per_block_from_builder(builder, vllm_config, groups),
        )
    else:
        from vllm.v1.core.kv_cache_utils import (
            _max_memory_usage_bytes_from_groups,
            _pool_bytes_per_block,
            get_kv_cache_groups,
        )

        groups = get_kv_cache_groups(vllm_config, specs)
        return (
            _max_memory_usage_bytes_from_groups(vllm_config, groups),
            _pool_bytes_per_block(vllm_config, groups),
        )


def add_serve_options(parser: Any) -> None:
    """Adds the model and all options of `vllm serve`."""
    if VLLM_0_33:
        from vllm.entrypoints.common.cli_args import make_arg_parser
    else:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser

    make_arg_parser(parser)
