# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The counters in the process's Prometheus registry: on the server's `/metrics`, and in
`LLM.get_metrics()`. They are read at each scrape, so a step costs nothing.

They are a collector, not an entry point of `vllm.stat_logger_plugins`. `LLM` does not
load such a plugin, and its presence alone turns statistics on again under
`--disable-log-stats`.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from vllm.logger import init_logger

from vllm.model_executor.layers.fused_moe.expert_slots.counters import (
    SIZES,
    TOTALS,
    give_directory_to_ray,
    read_counters,
)

logger = init_logger(__name__)

_LABELS = ["model_name", "rank", "layer"]
_exposed: "SlotCollector | None" = None


class SlotCollector(Collector):
    """Turns the workers' counter files into `vllm:moe_prefetch_*` samples, by layer and
    rank."""

    def __init__(self, directory: Path, model_name: str):
        self._directory = directory
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        readings = read_counters(self._directory) if self._directory.is_dir() else []
        for family, fields in (
            (CounterMetricFamily, TOTALS),
            (GaugeMetricFamily, SIZES),
        ):
            for name, text in fields.items():
                metric = family(f"vllm:moe_prefetch_{name}", f"{text}.", labels=_LABELS)
                for reading in readings:
                    labels = [self._model_name, str(reading.rank), reading.layer]
                    metric.add_metric(labels, reading.values[name])
                yield metric


def expose(directory: Path, vllm_config: Any) -> None:
    """Registers the counters of the engine that is about to start in this process, in
    the place of an earlier engine's.

    Args:
        directory: of the workers' counter files.
    """
    global _exposed
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        logger.warning_once(
            "Several API servers share one /metrics, so the vllm:moe_prefetch_* "
            "counters are not on it. Use --api-server-count 1, or call "
            "collective_rpc('expert_slot_counters')."
        )
        return
    parallel = vllm_config.parallel_config
    if "ray" in (parallel.distributed_executor_backend, parallel.data_parallel_backend):
        give_directory_to_ray()
    if parallel.nnodes > 1 and parallel.node_rank == 0:
        logger.warning_once(
            "The vllm:moe_prefetch_* counters on /metrics cover this node's ranks. "
            "The ranks of %d other nodes are missing. Call "
            "collective_rpc('expert_slot_counters') for all ranks.",
            parallel.nnodes - 1,
        )
    if _exposed is not None:
        REGISTRY.unregister(_exposed)
    model_name = vllm_config.model_config.served_model_name
    _exposed = SlotCollector(directory, model_name)
    REGISTRY.register(_exposed)
