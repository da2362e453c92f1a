# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What other processes do with a shared store in the tests."""

import time
from pathlib import Path
from typing import Any

import torch

from vllm.model_executor.layers.fused_moe.expert_slots.cpu.memory import CPUMemory
from vllm.model_executor.layers.fused_moe.expert_slots.shared_store.store import (
    shared_store,
)

LAYERS = ["a", "b", "c", "d"]


def tensors_of(layer: str) -> dict[str, torch.Tensor]:
    """Three experts of a layer."""
    generator = torch.Generator().manual_seed(ord(layer))
    return {
        "w13_weight": torch.randn(3, 64, 33, generator=generator).to(torch.bfloat16),
        "w2_bias": torch.randn(3, 7, generator=generator),
    }


def build_slowly(
    place: Path, identity: dict[str, Any], started: Any, answers: Any = None
) -> None:
    """Builds the store, or attaches it; says which."""
    started.set()
    with shared_store(place, identity) as store:
        for layer in LAYERS:
            if not store.ready:
                time.sleep(0.02)
                store.add(layer, tensors_of(layer))
        time.sleep(0.02)
    if answers is not None:
        answers.put("attached" if store.ready else "built")


def attach(place: Path, identity: dict[str, Any], write: bool) -> None:
    """Attaches the store as a layer does, and writes into it if told to."""
    with shared_store(place, identity) as store:
        tensor = store.attach("a")["w13_weight"]
        CPUMemory().pin(tensor, read_only=True)
        if write:
            tensor.zero_()
