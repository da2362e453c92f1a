# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The MoE layer, its kernels, and how vLLM builds both."""

from vllm.plugins.moe_gpu_prefetch.stock.seam import (
    V0_33,
    relied_on,
    replaced,
    wrapped,
)

_MOE = "vllm.model_executor.layers.fused_moe"
_LAYER = f"{_MOE}.routed_experts:RoutedExperts"
_CPU_KERNEL = f"{_MOE}.experts.cpu_moe:CPUUnquantizedExperts"
_CONFIG = f"{_MOE}.config:FusedMoEConfig"
_METHOD = f"{_MOE}.fused_moe_method_base:FusedMoEMethodBase"
_ARRAYS = ("output", "hidden_states", "w1", "w2", "topk_weights", "topk_ids")

LAYERS = (
    replaced(
        _LAYER,
        "becomes, with all classes derived from it, a layer whose parameters are rows",
        "layer_name",
        "params_dtype",
        "moe_config",
        "quant_config",
        in_tree="FusedMoEFactory in layer.py picks the slotted class when the option "
        "is set",
    ),
    replaced(
        f"{_MOE}.runner.moe_runner:MoERunner",
        "becomes a runner that refuses slots where a model has its own runner class",
        "layer_name",
        "routed_experts",
        in_tree="nothing: such a runner says itself whether it can",
    ),
    relied_on(
        "vllm.model_executor.custom_op:op_registry_oot",
        "shows whether another plugin has registered one of the replaced names",
    ),
    relied_on(
        "vllm.model_executor.custom_op:PluggableLayer.register_oot",
        "registers our classes",
    ),
    relied_on(
        f"{_LAYER}.forward_modular",
        "shows a layer class that rewrites expert ids itself, which is refused",
    ),
    relied_on(
        f"{_LAYER}.weight_loader",
        "its arguments tell which part of which expert a tensor is, and so its shape",
        "param",
        "loaded_weight",
        "weight_name",
        "shard_id",
        "expert_id",
    ),
    relied_on(
        f"{_LAYER}._map_global_expert_id_to_local_expert_id",
        "maps the checkpoint's expert id to this rank's",
        "expert_id",
    ),
    relied_on(
        f"{_LAYER}.global_num_experts",
        "gives the share of a token's experts that a rank loads (set in __init__)",
    ),
    relied_on(
        f"{_CONFIG}.num_local_experts",
        "tells, with experts_per_token, before a layer is built whether it gets slots",
    ),
    *(
        relied_on(f"{_MOE}.config:{name}", "gives an expert's shape in a checkpoint")
        for name in (
            "FusedMoEConfig.hidden_dim_unpadded",
            "FusedMoEConfig.intermediate_size_per_partition_unpadded",
            "FusedMoEConfig.is_act_and_mul",
            "FusedMoEConfig.moe_parallel_config",
            "FusedMoEParallelConfig.tp_size",
        )
    ),
    relied_on(
        f"{_CONFIG}.require_decomposed_backend",
        "is set for a slotted layer: no kernel may route by itself",
        versions=V0_33,
    ),
    relied_on(
        f"{_MOE}.modular_kernel:FusedMoEKernel.fused_experts",
        "is the experts object that gets a layer's slot manager",
    ),
    relied_on(
        f"{_MOE}.modular_kernel:FusedMoEKernelModularImpl.fused_experts",
        "is replaced by an object of our class with the same attributes (set in "
        "__init__)",
    ),
    relied_on(
        f"{_MOE}.modular_kernel:FusedMoEExperts.is_supported_config",
        "tells stock's oracles which kernels support a layer; while a layer is built, "
        "those that slots do not serve do not",
        in_tree="the oracles skip kernels without `supports_expert_slots` when the "
        "option is set",
    ),
    relied_on(
        f"{_MOE}.unquantized_fused_moe_method:UnquantizedFusedMoEMethod.experts_cls",
        "tells a layer's kernel, as in the methods of other formats (set in __init__)",
    ),
    relied_on(f"{_METHOD}.moe_kernel", "holds the experts object (set in __init__)"),
    relied_on(
        f"{_METHOD}.moe_quant_config",
        "is searched for per-expert tensors, which become rows (set in __init__)",
    ),
    relied_on(
        f"{_MOE}.experts.triton_moe:TritonExperts.apply",
        "is the GPU's kernel; our subclass plans, loads, and calls it with row numbers",
        *_ARRAYS,
        "activation",
        "global_num_experts",
        "expert_map",
        in_tree="the subclass is selected by the oracle when the option is set",
    ),
    relied_on(
        f"{_MOE}.experts.marlin_moe:MarlinExperts.apply",
        "is the GPU's kernel of packed weights; our subclass plans and loads before it",
        *_ARRAYS,
    ),
    wrapped(
        f"{_MOE}.experts.marlin_moe:moe_align_block_size",
        "maps the expert blocks of a slotted layer to rows",
        in_tree="MarlinExperts maps the block list when it has a slot manager",
        deferred=True,
    ),
    relied_on(
        _CPU_KERNEL,
        "is extended, with its subclasses: plans, loads, and runs on row numbers",
    ),
    relied_on(
        f"{_LAYER}._loaded_expert_biases",
        "says which biases a checkpoint has; those of an attached store were read once "
        "(set in __init__)",
    ),
    relied_on(f"{_CPU_KERNEL}.apply", "is the CPU's kernel", *_ARRAYS),
    relied_on(
        "vllm.forward_context:ForwardContext.is_padding",
        "marks padded rows, if VLLM_MOE_SKIP_PADDING is set (a field)",
    ),
    relied_on(
        "vllm.envs:VLLM_MOE_SKIP_PADDING",
        "tells whether stock's routers use that mask and its runners update it",
    ),
    relied_on(
        "vllm.forward_context:ForwardContext.no_compile_layers",
        "finds the layer from inside the opaque op (a field)",
    ),
    relied_on(
        "vllm.utils.torch_utils:direct_register_custom_op",
        "registers the opaque op",
        "op_name",
        "op_func",
        "fake_impl",
        "tags",
    ),
    relied_on(
        "vllm.utils.torch_utils:_encode_layer_name",
        "turns a layer's name into an argument of the op",
    ),
    relied_on(
        "vllm.utils.torch_utils:_resolve_layer_name",
        "turns that argument into the layer's name",
    ),
)
