# SPDX-License-Identifier: Apache-2.0
"""The loader seam: the one place that every loaded model passes, in whatever process."""

import functools
from typing import Any

import torch
from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from vllm.model_executor.layers.fused_moe.expert_slots.config import (
    MoEPrefetchConfig,
    MoEPrefetchError,
)
from vllm.plugins.moe_gpu_prefetch.compatibility import another_plugin
from vllm.plugins.moe_gpu_prefetch.wrapping import Wrap


def wraps() -> tuple[Wrap, ...]:
    """`BaseModelLoader.load_model`, with slots where they were asked for."""
    load_model = BaseModelLoader.load_model

    @functools.wraps(load_model)
    def load_model_into_slots(
        self: BaseModelLoader, vllm_config: Any, model_config: Any, *args: Any, **kwargs: Any
    ) -> torch.nn.Module:
        def stock() -> torch.nn.Module:
            return load_model(self, vllm_config, model_config, *args, **kwargs)

        config = MoEPrefetchConfig.from_additional_config(vllm_config.additional_config)
        if config is None:
            return stock()
        if reason := another_plugin():
            raise MoEPrefetchError(reason)
        from vllm.plugins.moe_gpu_prefetch.loading import load_into_slots

        return load_into_slots(stock, self, vllm_config, model_config, config)

    return (Wrap(BaseModelLoader, "load_model", load_model_into_slots),)


def refuse_a_loader_that_bypasses_us(load_config: Any) -> None:
    """Raises:
    MoEPrefetchError: this load format's class has a `load_model` of its own.
    """
    loader = _LOAD_FORMAT_TO_MODEL_LOADER.get(load_config.load_format)
    if loader is not None and loader.load_model is not BaseModelLoader.load_model:
        raise MoEPrefetchError(
            f"--moe-gpu-prefetch cannot be combined with --load-format {load_config.load_format}: "
            f"{loader.__module__}.{loader.__qualname__} loads models in a way of its own. Use "
            "another load format, or serve without --moe-gpu-prefetch."
        )
