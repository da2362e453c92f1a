# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The capacity plan: a model built on the meta device, and its KV cache."""

from vllm.plugins.moe_gpu_prefetch.stock.seam import V0_32, V0_33, relied_on

_PLATFORM = "vllm.platforms.interface:Platform"
_KV_0_32 = "vllm.v1.core.kv_cache_utils"
_KV_0_33 = "vllm.v1.core.kv_cache_planning"

CAPACITY = (
    relied_on(
        "vllm.model_executor.model_loader.utils:initialize_model",
        "builds the model on the meta device",
        "vllm_config",
        "model_config",
        in_tree="the capacity plan would be made by the worker, in `load_model`, "
        "before it reads a weight",
    ),
    relied_on(
        "vllm.distributed.parallel_state:GroupCoordinator",
        "stands in for parallel groups in the plan's process: its attributes, and "
        "the module's globals _WORLD, _TP, _ETP, _PP, _DP, _EP, _EPLB, _PCP, _DCP",
    ),
    relied_on(
        "vllm.model_executor.layers.fused_moe.expert_map_manager:ExpertMapManager",
        "stays on the CPU while a model is built on the meta device",
    ),
    relied_on(
        "vllm.model_executor.models.transformers.fusers.moe:trace",
        "is called once for each class of a model of the transformers backend",
        "module",
        deferred=True,
    ),
    relied_on(
        "vllm.model_executor.layers.attention.mla_attention:MLAAttention",
        "its attributes kv_b_proj, kv_lora_rank, num_heads, qk_nope_head_dim, "
        "v_head_dim and chunked_prefill_workspace_size say what MLA takes beside its "
        "parameters",
    ),
    relied_on(
        "vllm.model_executor.layers.linear:UnquantizedLinearMethod",
        "has a `kv_b_proj` of which vLLM makes no copy",
    ),
    relied_on(
        "vllm.utils.system_utils:get_mp_context",
        "starts the process that makes the plan as vLLM starts its own",
    ),
    relied_on(
        "vllm.plugins:load_general_plugins",
        "is called in that process: models may come from other plugins",
    ),
    relied_on(
        "vllm.platforms.interface:set_assigned_physical_gpu_ids",
        "tells that process which GPUs --device-ids names",
        "ids",
    ),
    relied_on(
        f"{_PLATFORM}.logical_device_id_to_visible_device_id",
        "gives the GPU of a rank",
        "device_id",
    ),
    relied_on(
        f"{_PLATFORM}.check_if_supports_dtype", "is asked before a worker asks", "dtype"
    ),
    relied_on(
        f"{_PLATFORM}.get_device_total_memory",
        "gives the memory of which gpu_memory_utilization is a share",
    ),
    relied_on(
        f"{_PLATFORM}.update_block_size_for_backend",
        "settles the size of a block once the attention layers are known",
        "vllm_config",
    ),
    relied_on(
        "vllm.v1.worker.gpu.attn_utils:get_kv_cache_spec",
        "gives the KV cache that the attention layers ask for",
        "vllm_config",
    ),
    relied_on(
        "vllm.v1.worker.worker_base:WorkerBase.get_supported_kv_cache_layouts",
        "is called on an object that has a vllm_config and nothing else",
    ),
    relied_on(
        "vllm.v1.attention.backends.utils:resolve_kv_cache_layout",
        "settles the layout that grouping the KV cache asks for",
        "vllm_config",
        "supported_layouts",
        "kv_cache_specs",
    ),
    relied_on(
        f"{_KV_0_32}:get_kv_cache_groups",
        "groups the KV cache as the engine does",
        versions=V0_32,
    ),
    relied_on(
        f"{_KV_0_33}:get_kv_cache_groups_from_builder",
        "groups the KV cache as the engine does",
        versions=V0_33,
    ),
    relied_on(
        "vllm.v1.core.kv_cache_config_builder:get_kv_cache_config_builder",
        "gives the platform's builder for that",
        versions=V0_33,
    ),
    *(
        relied_on(
            f"{module}:_max_memory_usage_bytes_from_groups",
            "counts the KV cache of one sequence as vLLM's own check does",
            versions=versions,
        )
        for module, versions in ((_KV_0_32, V0_32), (_KV_0_33, V0_33))
    ),
    relied_on(
        f"{_KV_0_32}:_pool_bytes_per_block",
        "counts one block of the KV cache",
        versions=V0_32,
    ),
    relied_on(
        f"{_KV_0_33}:_pool_bytes_per_block_from_builder",
        "counts one block of the KV cache",
        versions=V0_33,
    ),
)
