# SPDX-License-Identifier: Apache-2.0
"""After loading: says what was decided; refuses a model whose experts slipped past the slots."""

import functools
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.platforms import current_platform

from vllm.model_executor.layers.fused_moe.expert_slots.config import (
    MoEPrefetchConfig,
    MoEPrefetchError,
)
from vllm.model_executor.layers.fused_moe.expert_slots.load_coverage import check_all
from vllm.model_executor.layers.fused_moe.expert_slots.routed_experts import ExpertSlotsMixin
from vllm.plugins.moe_gpu_prefetch.layers import install_for_transformers_backend

logger = init_logger(__name__)

_GIB = 1 << 30
_resets_after_warm_up = False


def resident_sequences(num_experts: int, top_k: int, slots: int) -> int:
    """Sequences that may decode together before their experts outgrow the slots.

    A batch of b needs `E * (1 - (1 - k / E) ** b)` distinct experts if routing is uniform; real
    routing is more local, so this is the low end.
    """
    batch = 1
    while num_experts * (1 - (1 - top_k / num_experts) ** (batch + 1)) <= slots:
        batch += 1
    return batch


def report(model: torch.nn.Module, config: MoEPrefetchConfig, model_config: Any) -> None:
    """Checks a loaded model and logs the one line that says what its slots cost.

    Raises:
        MoEPrefetchError: the checkpoint did not bring every expert, or the slots did not reach
            every layer.
    """
    layers = [module for module in model.modules() if isinstance(module, RoutedExperts)]
    missed = [layer for layer in layers if not isinstance(layer, ExpertSlotsMixin)]
    slotted = [layer for layer in layers if getattr(layer, "slots", None) is not None]
    if missed:
        raise MoEPrefetchError(
            f"--moe-gpu-prefetch {config.slots}: {len(missed)} of {len(layers)} MoE layers of "
            f"{type(model).__name__} ({model_config.model}) cannot be put into slots: "
            f"{missed[0].layer_name} is run by a class of the model's own around "
            f"{type(missed[0]).__name__}. Serve it without --moe-gpu-prefetch."
        )
    check_all([layer.load_coverage for layer in slotted])
    if slotted:
        first = slotted[0]
        logger.info(
            "Expert slots: %d MoE layers, %d experts top-%d, %d slots each (%s): %.3f GiB of slots "
            "on %s, %.3f GiB of experts in host memory, %d bytes per expert. About %d concurrent "
            "sequences keep their experts resident.",
            len(slotted),
            first.local_num_experts,
            first.top_k,
            first.num_slots,
            config.policy,
            sum(layer.slots.buffers.num_bytes for layer in slotted) / _GIB,
            first.moe_config.device,
            sum(layer.slots.store.num_bytes for layer in slotted) / _GIB,
            first.slots.store.bytes_per_expert,
            resident_sequences(first.local_num_experts, first.top_k, first.num_slots),
        )
    elif not layers and model_config.is_moe:
        raise MoEPrefetchError(
            f"--moe-gpu-prefetch {config.slots}: {type(model).__name__} ({model_config.model}) is "
            "a MoE model whose experts do not go through vLLM's fused-MoE layer, so they cannot "
            "be put into slots. Serve it without --moe-gpu-prefetch."
        )
    elif not layers:
        logger.info(
            "--moe-gpu-prefetch %d is ignored: %s is a dense model.",
            config.slots,
            model_config.model,
        )


def install() -> None:
    """Wraps `BaseModelLoader.load_model`, the one place every loaded model passes."""
    load_model = BaseModelLoader.load_model

    @functools.wraps(load_model)
    def load_model_and_report(
        self: BaseModelLoader, vllm_config: Any, model_config: Any, *args: Any, **kwargs: Any
    ) -> torch.nn.Module:
        config = MoEPrefetchConfig.from_additional_config(vllm_config.additional_config)
        if config is None:
            return load_model(self, vllm_config, model_config, *args, **kwargs)
        if model_config.using_transformers_backend():
            install_for_transformers_backend()
        model = load_model(self, vllm_config, model_config, *args, **kwargs)
        report(model, config, model_config)
        if current_platform.is_cuda():
            reset_after_warm_up()
        return model

    BaseModelLoader.load_model = load_model_and_report


def reset_after_warm_up() -> None:
    """Wraps the GPU worker's warm-up: what its dummy batches loaded and counted is undone, so that
    the first request finds the slots as loading left them. Called in workers only, once they have
    imported what is wrapped."""
    from vllm.v1.worker.gpu_worker import Worker

    from vllm.model_executor.layers.fused_moe.expert_slots.device_slots import DeviceSlotManager

    global _resets_after_warm_up
    if _resets_after_warm_up:
        return
    _resets_after_warm_up = True
    warm_up = Worker.compile_or_warm_up_model

    @functools.wraps(warm_up)
    def warm_up_and_reset(self: Worker) -> Any:
        times = warm_up(self)
        for module in self.get_model().modules():
            slots = getattr(module, "slots", None)
            if isinstance(slots, DeviceSlotManager):
                slots.reset()
        return times

    Worker.compile_or_warm_up_model = warm_up_and_reset
