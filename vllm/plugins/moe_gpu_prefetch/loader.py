# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The loader seam: every model of every process is loaded through this method."""

import functools
from typing import Any

import torch
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from vllm.model_executor.layers.fused_moe.expert_slots.config import (
    MoEPrefetchConfig,
    MoEPrefetchError,
)
from vllm.plugins.moe_gpu_prefetch.failures import ending
from vllm.plugins.moe_gpu_prefetch.stock.check import another_plugin
from vllm.plugins.moe_gpu_prefetch.stock.wrapping import Wrap


def wraps() -> tuple[Wrap, ...]:
    """The wrap of `BaseModelLoader.load_model`, which loads into slots if they were
    asked for."""
    load_model = BaseModelLoader.load_model

    @functools.wraps(load_model)
    def load_model_into_slots(
        self: BaseModelLoader,
        vllm_config: Any,
        model_config: Any,
        *args: Any,
        **kwargs: Any,
    ) -> torch.nn.Module:
        def stock() -> torch.nn.Module:
            return load_model(self, vllm_config, model_config, *args, **kwargs)

        config = MoEPrefetchConfig.of(vllm_config)
        if config is None:
            return stock()
        try:
            if reason := another_plugin():
                raise MoEPrefetchError(reason)
            from vllm.plugins.moe_gpu_prefetch.loading import load_into_slots

            return load_into_slots(stock, self, vllm_config, model_config, config)
        except MoEPrefetchError as refusal:
            raise ending(refusal) from None

    return (Wrap(BaseModelLoader, "load_model", load_model_into_slots),)
