# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What loading a model goes through."""

from vllm.plugins.moe_gpu_prefetch.stock.seam import relied_on, wrapped

_LOADER = "vllm.model_executor.model_loader"
_QUANTISATION = "vllm.model_executor.layers.quantization.base_config"

LOADING = (
    wrapped(
        f"{_LOADER}.base_loader:BaseModelLoader.load_model",
        "loads a model into slots; refuses a MoE model that the slots do not reach",
        "vllm_config",
        "model_config",
        in_tree="one call at the end of this method",
    ),
    relied_on(
        f"{_LOADER}.base_loader:BaseModelLoader.load_weights",
        "is wrapped on the instance: a model is checked before it reads its weights",
        "model",
        "model_config",
        in_tree="a check between the two in load_model",
    ),
    relied_on(
        f"{_LOADER}.base_loader:BaseModelLoader.download_model",
        "downloads a checkpoint before a shared store is named after its files",
        "model_config",
    ),
    relied_on(
        f"{_LOADER}:_LOAD_FORMAT_TO_MODEL_LOADER",
        "shows a loader with its own load_model, which the slots would not reach",
    ),
    relied_on(
        f"{_LOADER}.weight_utils:safe_open",
        "is replaced while a slotted model loads: files are read in windows",
        in_tree="safetensors_weights_iterator maps a file anew after so many bytes",
    ),
    relied_on(
        f"{_QUANTISATION}:QuantizationConfig",
        "finds a layer's quantisation among its arguments",
    ),
    relied_on(
        f"{_QUANTISATION}:QuantizeMethodBase.process_weights_after_loading",
        "is wrapped on the layer's own instance: slots are made right after it",
        "layer",
        in_tree="the slotted class makes its rows in a hook of the loader",
    ),
    relied_on(
        f"{_QUANTISATION}:QuantizeMethodBase.requires_device_loading",
        "is False on the instance: the loader must not move experts to the device",
    ),
    relied_on(
        "vllm.utils.mem_utils:MemorySnapshot",
        "reads the GPU's memory before and after loading, as stock's own budget does: "
        "total_memory, free_memory, torch_memory",
    ),
    relied_on(
        "vllm.platforms.interface:Platform.is_integrated_gpu",
        "leaves out of that comparison a GPU that shares the host's memory",
        "device_id",
    ),
    relied_on(
        "vllm.utils.platform_utils:is_pin_memory_available",
        "is false under WSL2 unless VLLM_WSL2_ENABLE_PIN_MEMORY is set",
    ),
    relied_on(
        "vllm.envs:VLLM_WSL2_ENABLE_PIN_MEMORY",
        "is the way out that a refusal under WSL2 names",
    ),
)
