# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Every name of vLLM that this feature wraps, replaces or relies on: one line each. A
test resolves the table against the installed vLLM, so that an upgrade fails there, with
the seam's name."""

import importlib
import inspect
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any, Literal

from packaging.specifiers import SpecifierSet
from packaging.version import Version

SUPPORTED = SpecifierSet(">=0.32,<0.34", prereleases=True)

_0_32 = SpecifierSet("<0.33.dev0", prereleases=True)
_0_33 = SpecifierSet(">=0.33.dev0", prereleases=True)

_MOE = "vllm.model_executor.layers.fused_moe"


@dataclass(frozen=True)
class Seam:
    """`target` is module:qualname; `parameters` are those we rely on, by name;
    `in_tree` says what the same feature would do at this place as a patch on vLLM
    itself; `versions` are those that have it; a `deferred` one is checked where it is
    applied, because its import takes long; one `on_cuda` cannot be imported without
    CUDA's libraries."""

    target: str
    kind: Literal["wrapped", "replaced", "relied on"]
    reason: str
    in_tree: str = ""
    parameters: tuple[str, ...] = ()
    versions: SpecifierSet = SUPPORTED
    deferred: bool = False
    on_cuda: bool = False

    def applies_to(self, version: str) -> bool:
        return self.versions.contains(Version(version))


SEAMS = (
    Seam(
        "vllm.engine.arg_utils:EngineArgs.add_cli_args",
        "wrapped",
        "adds the ExpertSlots group to every engine's parser",
        "two fields on EngineArgs and a group of their own in this method",
        ("parser",),
    ),
    Seam(
        "vllm.engine.arg_utils:EngineArgs.from_cli_args",
        "wrapped",
        "merges the flags into additional_config; refuses conflicts before anything "
        "starts",
        "nothing: the two fields are picked up as they are",
        ("args",),
    ),
    Seam(
        "vllm.engine.arg_utils:EngineArgs.create_engine_config",
        "wrapped",
        "refuses conflicts for LLM(...) too; makes the memory plan; opens and exposes "
        "counters",
        "builds MoEPrefetchConfig, a field of OffloadConfig with the checks as its "
        "validator",
    ),
    Seam(
        "vllm.model_executor.model_loader.base_loader:BaseModelLoader.load_model",
        "wrapped",
        "logs what was decided; refuses a MoE model that slipped past the slots",
        "one call at the end of this method",
        ("vllm_config", "model_config"),
    ),
    Seam(
        "vllm.model_executor.model_loader.base_loader:BaseModelLoader.load_weights",
        "relied on",
        "wrapped on the instance: a model is checked before it reads its weights",
        "a check between the two in load_model",
        ("model", "model_config"),
    ),
    Seam(
        "vllm.v1.executor.abstract:Executor.__init__",
        "wrapped",
        "ends with the refusal that a worker left, in the place of an error without a "
        "reason",
        "a worker sends the reason through the pipe by which it says that it is ready",
    ),
    Seam(
        "vllm.v1.engine.utils:wait_for_engine_startup",
        "wrapped",
        "raises the refusal that the engine left, in the place of an error without a "
        "reason",
        "the engine sends the reason in the handshake",
    ),
    Seam(
        f"{_MOE}.routed_experts:RoutedExperts",
        "replaced",
        "out-of-tree registry, with all classes derived from it: parameters become "
        "rows",
        "FusedMoEFactory in layer.py picks the slotted class when the option is set",
        ("layer_name", "params_dtype", "moe_config", "quant_config"),
    ),
    Seam(
        f"{_MOE}.runner.moe_runner:MoERunner",
        "replaced",
        "out-of-tree registry: a runner of a model's own is refused where there are "
        "slots",
        "nothing: such a runner says itself whether it can",
        ("layer_name", "routed_experts"),
    ),
    Seam(
        "vllm.v1.worker.gpu_worker:Worker.compile_or_warm_up_model",
        "wrapped",
        "undoes what warm-up batches loaded and counted (workers of a slotted model "
        "only)",
        "one call at the end of this method",
        deferred=True,
    ),
    Seam(
        "vllm.v1.worker.cpu_worker:CPUWorker.compile_or_warm_up_model",
        "wrapped",
        "the same on the CPU platform",
        "one call at the end of this method",
        deferred=True,
    ),
    Seam(
        "vllm.v1.worker.gpu_worker:Worker.shutdown",
        "wrapped",
        "writes the residents for the next start, if warm_start names a directory; "
        "every executor calls it when a worker ends, also after SIGTERM",
        "one call at the beginning of this method",
        deferred=True,
    ),
    *(
        Seam(
            f"vllm.v1.worker.gpu_worker:Worker.{name}",
            "wrapped",
            "refused for a slotted model, before anything has changed",
            "a check at the beginning of this method",
            deferred=True,
        )
        for name in (
            "reload_weights",
            "reset_weights",
            "compute_weight_checksums",
            "save_tensorized_model",
        )
    ),
    Seam(
        f"{_MOE}.experts.triton_moe:TritonExperts.apply",
        "relied on",
        "subclassed: plans, loads, and runs it on row numbers; set as experts_cls on "
        "the method",
        "the subclass is selected by the oracle when the option is set",
        (
            *(
                "output",
                "hidden_states",
                "w1",
                "w2",
                "topk_weights",
                "topk_ids",
                "activation",
            ),
            *("global_num_experts", "expert_map"),
        ),
    ),
    Seam(
        "vllm.forward_context:ForwardContext.is_padding",
        "relied on",
        "rows that no request asked for, if VLLM_MOE_SKIP_PADDING is set (a dataclass "
        "field)",
    ),
    Seam(
        "vllm.envs:VLLM_MOE_SKIP_PADDING",
        "relied on",
        "tells whether stock's routers use that mask, and its model runners keep it up "
        "to date",
    ),
    Seam(
        f"{_MOE}.experts.cpu_moe:CPUUnquantizedExperts",
        "relied on",
        "extended, with its subclasses: plans, loads, and runs on row numbers",
    ),
    Seam(
        f"{_MOE}.experts.cpu_moe:CPUUnquantizedExperts._padded_intermediate_size",
        "relied on",
        "the width that an expert gets as it is processed",
        "",
        ("moe_config",),
    ),
    Seam(
        f"{_MOE}.experts.cpu_moe:CPUUnquantizedExperts.apply",
        "relied on",
        "the one call of the CPU platform's kernel",
        "",
        ("output", "hidden_states", "w1", "w2", "topk_weights", "topk_ids"),
    ),
    Seam(
        f"{_MOE}.config:FusedMoEConfig.num_local_experts",
        "relied on",
        "tells, with experts_per_token, before a layer is built whether it gets slots",
    ),
    Seam(
        f"{_MOE}.routed_experts:RoutedExperts.forward_modular",
        "relied on",
        "a class with one of its own is refused: it works on the router's choices",
    ),
    Seam(
        f"{_MOE}.routed_experts:RoutedExperts.weight_loader",
        "relied on",
        "its arguments tell which part of which expert a tensor is, and so its shape",
        "",
        ("param", "loaded_weight", "weight_name", "shard_id", "expert_id"),
    ),
    Seam(
        f"{_MOE}.routed_experts:RoutedExperts._map_global_expert_id_to_local_expert_id",
        "relied on",
        "the checkpoint's expert id as this rank counts it",
        "",
        ("expert_id",),
    ),
    *(
        Seam(
            f"{_MOE}.config:{name}",
            "relied on",
            "the shape of an expert in a checkpoint",
        )
        for name in (
            "FusedMoEConfig.hidden_dim_unpadded",
            "FusedMoEConfig.intermediate_size_per_partition_unpadded",
            "FusedMoEConfig.is_act_and_mul",
            "FusedMoEConfig.moe_parallel_config",
            "FusedMoEParallelConfig.tp_size",
        )
    ),
    Seam(
        f"{_MOE}.config:FusedMoEConfig.require_decomposed_backend",
        "relied on",
        "set on a slotted layer's configuration: no kernel may route by itself",
        versions=_0_33,
    ),
    Seam(
        f"{_MOE}.modular_kernel:FusedMoEKernel.fused_experts",
        "relied on",
        "the experts object that a layer's slots are given to on a GPU",
    ),
    Seam(
        f"{_MOE}.unquantized_fused_moe_method:UnquantizedFusedMoEMethod.experts_cls",
        "relied on",
        "says which kernel a layer has, and is set to ours on a GPU (set in __init__)",
    ),
    Seam(
        f"{_MOE}.fused_moe_method_base:FusedMoEMethodBase.moe_kernel",
        "relied on",
        "holds the experts object (set in __init__)",
    ),
    Seam(
        f"{_MOE}.fused_moe_method_base:FusedMoEMethodBase.moe_quant_config",
        "relied on",
        "searched for per-expert tensors that slots could not follow (set in __init__)",
    ),
    Seam(
        "vllm.model_executor.layers.quantization.base_config:QuantizationConfig",
        "relied on",
        "tells a layer's quantisation among what it is built of",
    ),
    Seam(
        "vllm.model_executor.layers.quantization.base_config:"
        "QuantizeMethodBase.process_weights_after_loading",
        "relied on",
        "wrapped on the layer's own instance: slots are made right after it",
        "the slotted class makes its rows in a hook of the loader",
        ("layer",),
    ),
    Seam(
        "vllm.model_executor.layers.quantization.base_config:"
        "QuantizeMethodBase.requires_device_loading",
        "relied on",
        "set False on the instance: the loader must not move the experts to the device",
    ),
    Seam(
        "vllm.model_executor.custom_op:op_registry_oot",
        "relied on",
        "shows whether another plugin holds one of the replaced names",
    ),
    Seam(
        "vllm.model_executor.custom_op:PluggableLayer.register_oot",
        "relied on",
        "the out-of-tree registry",
    ),
    Seam(
        "vllm.forward_context:ForwardContext.no_compile_layers",
        "relied on",
        "finds the layer from inside the opaque op (a dataclass field)",
    ),
    Seam(
        "vllm.utils.torch_utils:direct_register_custom_op",
        "relied on",
        "registers the opaque op",
        "",
        ("op_name", "op_func", "fake_impl", "tags"),
    ),
    Seam(
        "vllm.utils.torch_utils:_encode_layer_name",
        "relied on",
        "layer name as an op argument",
    ),
    Seam("vllm.utils.torch_utils:_resolve_layer_name", "relied on", "and back"),
    Seam(
        "vllm.config.utils:get_attr_docs",
        "relied on",
        "field docstrings as --help text",
    ),
    Seam(
        "vllm.config.parallel:ParallelConfig._api_process_rank",
        "relied on",
        "tells the process that starts engines from further API servers (a dataclass "
        "field)",
    ),
    Seam(
        "vllm.config.parallel:ParallelConfig._api_process_count",
        "relied on",
        "the same (a dataclass field)",
    ),
    Seam(
        "vllm.config.speculative:SpeculativeConfig.draft_model_config",
        "relied on",
        "tells whether a model of its own drafts: its runner_type is 'draft' (a "
        "dataclass field)",
    ),
    Seam(
        "vllm.model_executor.model_loader.weight_utils:safe_open",
        "relied on",
        "replaced while a slotted model loads: files are read in windows",
        "safetensors_weights_iterator maps a file anew after so many bytes",
    ),
    Seam(
        "vllm.model_executor.model_loader:_LOAD_FORMAT_TO_MODEL_LOADER",
        "relied on",
        "tells a loader class with a load_model of its own, which the slots would not "
        "reach",
    ),
    Seam(
        "vllm.model_executor.model_loader.base_loader:BaseModelLoader.download_model",
        "relied on",
        "brings a checkpoint here before a shared store is named after its files",
        "",
        ("model_config",),
    ),
    Seam(
        f"{_MOE}.expert_map_manager:ExpertMapManager",
        "relied on",
        "kept on the CPU while the plan builds a model on the meta device",
    ),
    Seam(
        "vllm.utils.system_utils:get_mp_context",
        "relied on",
        "starts the process that makes the plan as vLLM starts its own",
    ),
    Seam(
        "vllm.platforms.interface:set_assigned_physical_gpu_ids",
        "relied on",
        "tells that process which GPUs --device-ids names",
        "",
        ("ids",),
    ),
    Seam(
        "vllm.platforms.interface:Platform.logical_device_id_to_visible_device_id",
        "relied on",
        "the GPU of a rank",
        "",
        ("device_id",),
    ),
    Seam(
        "vllm.platforms.interface:Platform.check_if_supports_dtype",
        "relied on",
        "asked before a worker asks",
        "",
        ("dtype",),
    ),
    Seam(
        "vllm.plugins:load_general_plugins",
        "relied on",
        "called in that process: models may be another plugin's",
    ),
    Seam(
        "vllm.model_executor.models.transformers.fusers.moe:trace",
        "relied on",
        "called once for each class while the plan builds a model of the transformers "
        "backend",
        "",
        ("module",),
        deferred=True,
    ),
    Seam(
        "vllm.entrypoints.launchers.cli_args:make_arg_parser",
        "relied on",
        "gives the plan command the options of `vllm serve`",
        "",
        ("parser",),
        versions=_0_32,
        deferred=True,
    ),
    Seam(
        "vllm.entrypoints.common.cli_args:make_arg_parser",
        "relied on",
        "gives the plan command the options of `vllm serve`",
        "",
        ("parser",),
        versions=_0_33,
        deferred=True,
    ),
    Seam(
        "vllm.platforms:_current_platform",
        "relied on",
        "set by the plan command to a GPU that is elsewhere",
    ),
    Seam(
        "vllm.platforms:vllm_version_matches_substr",
        "relied on",
        "then says that this is no vLLM for CPUs, which has triton off",
        "",
        ("substr",),
    ),
    Seam(
        "vllm.platforms.cuda:CudaPlatformBase",
        "relied on",
        "extended to that GPU's platform",
        deferred=True,
        on_cuda=True,
    ),
    Seam(
        "vllm.platforms.interface:DeviceCapability",
        "relied on",
        "that GPU's compute capability",
    ),
    Seam(
        "vllm.model_executor.model_loader.utils:initialize_model",
        "relied on",
        "builds the model on the meta device, for the memory plan",
        "the plan would be made by the worker, in `load_model`, before it reads a "
        "weight",
        ("vllm_config", "model_config"),
    ),
    Seam(
        "vllm.distributed.parallel_state:GroupCoordinator",
        "relied on",
        "stands in for parallel groups in the plan's process: its attributes, and "
        "the module's globals _WORLD, _TP, _ETP, _PP, _DP, _EP, _EPLB, _PCP, _DCP",
    ),
    Seam(
        "vllm.v1.worker.gpu.attn_utils:get_kv_cache_spec",
        "relied on",
        "the KV cache that the attention layers ask for",
        "",
        ("vllm_config",),
    ),
    Seam(
        "vllm.v1.worker.worker_base:WorkerBase.get_supported_kv_cache_layouts",
        "relied on",
        "called with nothing but a vllm_config behind it",
    ),
    Seam(
        "vllm.v1.attention.backends.utils:resolve_kv_cache_layout",
        "relied on",
        "grouping the KV cache asks for its layout",
        "",
        ("vllm_config", "supported_layouts", "kv_cache_specs"),
    ),
    Seam(
        "vllm.v1.core.kv_cache_utils:get_kv_cache_groups",
        "relied on",
        "groups the KV cache as the engine does",
        versions=_0_32,
    ),
    Seam(
        "vllm.v1.core.kv_cache_planning:get_kv_cache_groups_from_builder",
        "relied on",
        "groups the KV cache as the engine does",
        versions=_0_33,
    ),
    Seam(
        "vllm.v1.core.kv_cache_config_builder:get_kv_cache_config_builder",
        "relied on",
        "the platform's way to do that",
        versions=_0_33,
    ),
    Seam(
        "vllm.v1.core.kv_cache_utils:_max_memory_usage_bytes_from_groups",
        "relied on",
        "the KV cache of one sequence, as vLLM's own check counts it",
        versions=_0_32,
    ),
    Seam(
        "vllm.v1.core.kv_cache_planning:_max_memory_usage_bytes_from_groups",
        "relied on",
        "the KV cache of one sequence, as vLLM's own check counts it",
        versions=_0_33,
    ),
    Seam(
        "vllm.v1.core.kv_cache_utils:_pool_bytes_per_block",
        "relied on",
        "one block of it",
        versions=_0_32,
    ),
    Seam(
        "vllm.v1.core.kv_cache_planning:_pool_bytes_per_block_from_builder",
        "relied on",
        "one block of it",
        versions=_0_33,
    ),
    Seam(
        "vllm.platforms.interface:Platform.update_block_size_for_backend",
        "relied on",
        "settles the size of a block once the attention layers are known",
        "",
        ("vllm_config",),
    ),
    Seam(
        "vllm.platforms.interface:Platform.get_device_total_memory",
        "relied on",
        "what gpu_memory_utilization is a share of",
    ),
    Seam(
        f"{_MOE}.routed_experts:RoutedExperts.global_num_experts",
        "relied on",
        "the share of a token's experts that a rank loads (set in __init__)",
    ),
    Seam(
        "vllm.utils.mem_utils:MemorySnapshot",
        "relied on",
        "the GPU's memory before and after loading, as stock's own budget reads it: "
        "its fields total_memory, free_memory, torch_memory",
    ),
    Seam(
        "vllm.platforms.interface:Platform.is_integrated_gpu",
        "relied on",
        "a GPU whose memory is the host's is left out of that comparison",
        "",
        ("device_id",),
    ),
    Seam(
        "vllm.utils.platform_utils:is_pin_memory_available",
        "relied on",
        "says no under WSL2 unless VLLM_WSL2_ENABLE_PIN_MEMORY is set: nothing is "
        "pinned then",
    ),
    Seam(
        "vllm.envs:VLLM_WSL2_ENABLE_PIN_MEMORY",
        "relied on",
        "the way out that a refusal under WSL2 names",
    ),
    Seam(
        "vllm.envs:VLLM_RAY_EXTRA_ENV_VARS_TO_COPY",
        "relied on",
        "set for engines on Ray, so that their workers know where the counters lie",
    ),
    Seam(
        "vllm.ray.ray_env:get_env_vars_to_copy",
        "relied on",
        "reads that list where a process is started on Ray",
    ),
    Seam(
        "vllm.config.parallel:ParallelConfig.data_parallel_backend",
        "relied on",
        "tells, with distributed_executor_backend, that processes are started on Ray",
    ),
    Seam(
        "vllm.config.parallel:ParallelConfig.node_rank",
        "relied on",
        "tells, with nnodes, that some counters are on other nodes (dataclass fields)",
    ),
    Seam(
        "vllm.utils.argparse_utils:FlexibleArgumentParser",
        "relied on",
        "the parser of `vllm-moe-prefetch plan`",
        "`vllm moe-prefetch plan`, a subcommand",
    ),
    Seam(
        "vllm.v1.metrics.prometheus:get_prometheus_registry",
        "relied on",
        "/metrics is prometheus_client's global registry, unless there are several API "
        "servers",
        "the samples are made in PrometheusStatLogger",
    ),
    Seam(
        "vllm.v1.metrics.prometheus:unregister_vllm_metrics",
        "relied on",
        "clears vLLM's own metrics by `_name`, which a collector does not have",
    ),
)


def resolve(target: str) -> Any:
    """The object that a seam names; for a field or an attribute set in `__init__`, its
    class.

    Raises:
        AttributeError, ImportError: it is not there.
    """
    module, _, qualname = target.partition(":")
    value = importlib.import_module(module)
    for name in qualname.split("."):
        if is_dataclass(value) and name in {field.name for field in fields(value)}:
            return value
        if inspect.isclass(value) and not hasattr(value, name):
            if f"self.{name}" not in inspect.getsource(value):
                raise AttributeError(f"{value.__name__} has no {name}")
            return value
        value = getattr(value, name)
    return value


def missing(seam: Seam) -> str | None:
    """What of a seam the installed vLLM lacks, or None."""
    try:
        value = resolve(seam.target)
        parameters = inspect.signature(value).parameters if seam.parameters else {}
    except (AttributeError, ImportError, TypeError, ValueError) as error:
        return str(error)
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return None
    lost = [name for name in seam.parameters if name not in parameters]
    return f"it takes no {', '.join(lost)}" if lost else None


@cache
def first_broken(at_start: bool = False) -> str | None:
    """Why slots cannot run on this vLLM although its version is supported, or None.

    Args:
        at_start: only what is wrapped in every process, whether slots are asked for or
            not.
    """
    import vllm

    for seam in SEAMS:
        if seam.deferred or (at_start and seam.kind != "wrapped"):
            continue
        if seam.applies_to(vllm.__version__) and (lack := missing(seam)):
            return not_as_known(f"{seam.target}: {lack}")
    return None


def require(target: str) -> None:
    """Checks a deferred seam, where it is applied.

    Raises:
        MoEPrefetchError: it is not as we know it.
    """
    from vllm.model_executor.layers.fused_moe.expert_slots.config import (
        MoEPrefetchError,
    )

    (seam,) = [seam for seam in SEAMS if seam.target == target]
    if lack := missing(seam):
        raise MoEPrefetchError(not_as_known(f"{target}: {lack}"))


def not_as_known(what: str) -> str:
    """Why slots cannot run on a vLLM that has been changed."""
    import vllm

    return (
        f"expert slots do not know this vLLM {vllm.__version__} ({what}): install a "
        f"released one of {SUPPORTED}, disable the plugin that changed it with "
        "VLLM_PLUGINS, or serve without --moe-gpu-prefetch."
    )


def unsupported_version() -> str | None:
    """Why the installed vLLM is outside the supported range, or None."""
    import vllm

    if SUPPORTED.contains(Version(vllm.__version__)):
        return None
    return (
        f"expert slots support vLLM {SUPPORTED}, this is {vllm.__version__}: install "
        "a supported vLLM, or serve without --moe-gpu-prefetch."
    )
