# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The counters on the server's `/metrics`, and in `LLM.get_metrics()`. They are read at
each scrape, so a step costs nothing.

Where ranks of tensor parallelism count the same steps, the samples are those of one of
them, so that a sum over all samples is right. What a rank alone moves and holds,
`counters.OF_EVERY_RANK`, is there for each.

They are a collector, not an entry point of `vllm.stat_logger_plugins`. `LLM` does not
load such a plugin, and its presence alone turns statistics on again under
`--disable-log-stats`.
"""

import functools
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY, multiprocess
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from vllm.logger import init_logger

from vllm import envs
from vllm.model_executor.layers.fused_moe.expert_slots.counters import (
    OF_EVERY_RANK,
    SIZES,
    TOTALS,
    give_directory_to_ray,
    read_counters,
)
from vllm.plugins.moe_gpu_prefetch.stock import wrapping
from vllm.plugins.moe_gpu_prefetch.stock.seams import require

logger = init_logger(__name__)

_LABELS = ["model_name", "rank", "layer"]
_LINK_LABELS = ["model_name", "rank"]
LINK = "Bytes a second, host-to-device, that the rank's link carried at the start"
_exposed: "SlotCollector | None" = None


class SlotCollector(Collector):
    """Turns the workers' counter files into `vllm:moe_prefetch_*` samples, by layer and
    rank.

    Args:
        directory: of the counter files. Without it there are no samples.
        model_name: the label of that name.
    """

    def __init__(self, directory: Path, model_name: str):
        self._directory = directory
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        readings = read_counters(self._directory)
        for family, fields in (
            (CounterMetricFamily, TOTALS),
            (GaugeMetricFamily, SIZES),
        ):
            for name, text in fields.items():
                metric = family(f"vllm:moe_prefetch_{name}", f"{text}.", labels=_LABELS)
                for reading in readings:
                    if reading.replica and name not in OF_EVERY_RANK:
                        continue
                    labels = [self._model_name, str(reading.rank), reading.layer]
                    metric.add_metric(labels, reading.values[name])
                yield metric
        link = GaugeMetricFamily(
            "vllm:moe_prefetch_link_bytes_per_second", f"{LINK}.", labels=_LINK_LABELS
        )
        measured = {r.rank: r.link for r in readings if r.link is not None}
        for rank, bandwidth in measured.items():
            link.add_metric([self._model_name, str(rank)], bandwidth)
        yield link


def expose(directory: Path, vllm_config: Any) -> None:
    """Shows the counters of the engine that this process is about to start, in the
    place of an earlier engine's.

    Args:
        directory: of the workers' counter files.
        vllm_config: of the engine.
    """
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
    if envs.VLLM_USE_RUST_FRONTEND:
        logger.warning_once(
            "vLLM's Rust front end answers /metrics without the vllm:moe_prefetch_* "
            "counters. Serve without VLLM_USE_RUST_FRONTEND, or call "
            "collective_rpc('expert_slot_counters')."
        )
    show(directory, vllm_config)


def show(directory: Path, vllm_config: Any) -> None:
    """Shows the counters in `directory` on this process's `/metrics`, in the place of
    those that it showed before. In each of several API servers this is all there is to
    do: their parent has started the engine.

    Raises:
        MoEPrefetchError: prometheus_client is not as the slots need it.
    """
    global _exposed
    if _exposed is not None:
        with suppress(KeyError):  # another part of the process has emptied the registry
            REGISTRY.unregister(_exposed)
    collector = SlotCollector(directory, vllm_config.model_config.served_model_name)
    REGISTRY.register(collector)
    _exposed = collector
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        _join_scrapes_of_several_servers()


@functools.cache
def _join_scrapes_of_several_servers() -> None:
    """Adds the counters where several API servers answer for each other. A scrape then
    makes a registry of its own, out of files that hold no collector's samples. The
    counter files are the same for all servers, so each gives the same totals."""
    require("prometheus_client.multiprocess:MultiProcessCollector.collect")
    collector = multiprocess.MultiProcessCollector
    collect = collector.collect

    @functools.wraps(collect)
    def collect_with_slots(self: multiprocess.MultiProcessCollector) -> list[Metric]:
        # Others may collect other processes' files with this class.
        ours = self._path == os.environ.get("PROMETHEUS_MULTIPROC_DIR")
        slots = _exposed.collect() if _exposed is not None and ours else []
        return [*collect(self), *slots]

    wrapping.install(wrapping.Wrap(collector, "collect", collect_with_slots))
