# SPDX-License-Identifier: Apache-2.0
"""The counters on the server's `/metrics`, read when they are scraped."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from vllm.logger import init_logger
from vllm.v1.metrics.loggers import StatLoggerBase

from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchConfig
from vllm.model_executor.layers.fused_moe.expert_slots.counters import (
    DIRECTORY_VARIABLE,
    SIZES,
    TOTALS,
    read_counters,
)

logger = init_logger(__name__)

_LABELS = ["model_name", "engine", "rank", "layer"]


class SlotCollector(Collector):
    """Turns the workers' counter files into `vllm:moe_prefetch_*` samples, by layer and rank."""

    def __init__(self, directory: Path, model_name: str, engine_index: int):
        self.directory = directory
        self._labels = [model_name, str(engine_index)]

    def collect(self) -> Iterator[Metric]:
        readings = read_counters(self.directory) if self.directory.is_dir() else []
        for family, fields in ((CounterMetricFamily, TOTALS), (GaugeMetricFamily, SIZES)):
            for name, text in fields.items():
                metric = family(f"vllm:moe_prefetch_{name}", f"{text}.", labels=_LABELS)
                for reading in readings:
                    labels = [*self._labels, str(reading.rank), reading.layer]
                    metric.add_metric(labels, reading.values[name])
                yield metric


class ExpertSlotsStatLogger(StatLoggerBase):
    """Entry point of `vllm.stat_logger_plugins`; does nothing where no slots were asked for."""

    def __init__(self, vllm_config: Any, engine_index: int = 0):
        self._vllm_config = vllm_config
        self._engine_index = engine_index

    def record(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do per step: the collector reads at scrape time."""

    def log_engine_initialized(self) -> None:
        # Not before: vLLM's own Prometheus logger clears `vllm:*` collectors when it is made,
        # which is after the loggers of plugins.
        config = MoEPrefetchConfig.from_additional_config(self._vllm_config.additional_config)
        directory = os.environ.get(DIRECTORY_VARIABLE)
        if config is None or directory is None:
            return
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            logger.warning(
                "Several API servers share one /metrics: the vllm:moe_prefetch_* counters are "
                "not on it. Use --api-server-count 1, or collective_rpc('expert_slot_counters')."
            )
            return
        served = self._vllm_config.model_config.served_model_name
        collector = SlotCollector(Path(directory), served, self._engine_index)
        for known in list(REGISTRY._collector_to_names):
            if isinstance(known, SlotCollector):
                REGISTRY.unregister(known)
        REGISTRY.register(collector)
