# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The GPU whose memory is checked."""

import gc
from collections.abc import Callable

import torch

from vllm.model_executor.layers.fused_moe.expert_slots.cuda.backend import CudaBackend
from vllm.model_executor.layers.fused_moe.expert_slots.cuda.driver import Driver
from vllm.model_executor.layers.fused_moe.expert_slots.weights.memory import Memory

EXPERTS, STAGED = 8, 5
"""Experts of the layers that are checked, and how many of their rows are staging."""


class Machine:
    """One GPU, by its number. The tests of these checks use a stand-in for it."""

    def __init__(self, driver: Driver, device: int = 0):
        self.driver, self.device = driver, device

    def memory(self) -> Memory:
        return CudaBackend().memory(torch.device("cuda", self.device))

    def synchronise(self) -> None:
        torch.cuda.synchronize(self.device)

    def twice(self, work: Callable[[], None]) -> None:
        """Does `work` as it is, and once more as a captured graph."""
        work()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        graph.replay()

    def free(self) -> int:
        gc.collect()
        return self.driver.call("cuMemGetInfo")[0]
