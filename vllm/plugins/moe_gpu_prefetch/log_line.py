# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The line about the slots after vLLM's periodic one ("Avg prompt throughput ..."). It
is logged where vLLM's is, and says what happened since the line before. The counter
files are read when it is logged, so a step costs nothing."""

import functools
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm.logger import init_logger

from vllm.model_executor.layers.fused_moe.expert_slots.counters import (
    TOTALS,
    LayerReading,
    read_counters,
)
from vllm.plugins.moe_gpu_prefetch.stock import wrapping
from vllm.plugins.moe_gpu_prefetch.stock.seams import require

logger = init_logger(__name__)

_STOCK = "vllm.v1.metrics.loggers:LoggingStatLogger"
_lines: dict[str, "SlotLine"] = {}
"""Of this process's engines, by the `instance_id` of their configuration."""


class SlotLine:
    """The lines of one engine.

    Args:
        directory: of its workers' counter files.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        self._before: dict[tuple[int, str], Counter[str]] = {}

    def text(self, seconds: float) -> str | None:
        """What the slots did since the last call; None if no step was made.

        Args:
            seconds: that have passed since then.
        """
        layers: dict[str, Counter[str]] = {}
        moved = 0
        links: dict[int, int | None] = {}
        for reading, made in self._made():
            moved += made["bytes_loaded"]
            # A draft's layers have no measurement of their own.
            links[reading.rank] = links.get(reading.rank) or reading.link
            if not reading.replica:
                layers.setdefault(reading.layer, Counter()).update(made)
        total = sum(layers.values(), Counter())
        if not total["steps"]:
            return None
        rate = moved / max(seconds, 1e-9)
        parts = [f"{_share(total['hits'], total['needed'])} hits{_worst(layers)}"]
        if total["loads"]:
            parts += [
                f"{total['loads'] / total['steps']:.2f} loads per layer and step",
                f"{_share(total['staged'], total['loads'])} of them staged",
                f"{rate / 1e9:.3g} GB/s host-to-device{_of_the_links(rate, links)}",
            ]
        else:
            parts.append("no loads")
        return f"Expert slots: {', '.join(parts)}."

    def _made(self) -> Iterator[tuple[LayerReading, Counter[str]]]:
        """Each layer and rank, and its totals since the last call."""
        for reading in read_counters(self._directory):
            now = Counter({name: reading.values[name] for name in TOTALS})
            key = reading.rank, reading.layer
            yield reading, now - self._before.get(key, Counter())
            self._before[key] = now


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f}%"


def _worst(layers: dict[str, Counter[str]]) -> str:
    """The layer with the lowest hit rate, if one is lower than another."""
    needing = {name: made for name, made in layers.items() if made["needed"]}
    rates = {name: made["hits"] / made["needed"] for name, made in needing.items()}
    if len(set(rates.values())) < 2:
        return ""
    worst = min(rates, key=lambda name: rates[name])
    return f" (worst layer {_number(worst)}: {100 * rates[worst]:.1f}%)"


def _number(layer: str) -> str:
    """`17` of `model.layers.17.mlp.experts`; the name if it has not one number."""
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", layer)
    return numbers[0] if len(numbers) == 1 else layer


def _of_the_links(rate: float, links: dict[int, int | None]) -> str:
    """The share of what the ranks' links carry together; nothing if one was not
    measured."""
    speeds = [speed for speed in links.values() if speed is not None]
    if len(speeds) < len(links):
        return ""
    ranks = f" of {len(links)} ranks" if len(links) > 1 else ""
    return f" ({_share(rate, sum(speeds))} of {sum(speeds) / 1e9:.1f} GB/s{ranks})"


def follow(directory: Path, instance: str) -> None:
    """Logs the lines of the engine that this process is about to start.

    Args:
        directory: of the workers' counter files.
        instance: the engine's `VllmConfig.instance_id`.

    Raises:
        MoEPrefetchError: this vLLM's logger is not as the slots need it.
    """
    _lines[instance] = SlotLine(directory)
    _add_to_stock()


@functools.cache
def _add_to_stock() -> None:
    for name in ("log", "last_log_time", "engine_is_idle", "vllm_config"):
        require(f"{_STOCK}.{name}")
    from vllm.v1.metrics.loggers import LoggingStatLogger

    log = LoggingStatLogger.log

    @functools.wraps(log)
    def log_with_slots(self: Any) -> None:
        seconds = time.monotonic() - self.last_log_time
        log(self)
        line = _lines.get(self.vllm_config.instance_id)
        if line is not None and (text := line.text(seconds)):
            say = logger.debug if self.engine_is_idle else logger.info  # as stock's
            say("%s", text)

    wrapping.install(wrapping.Wrap(LoggingStatLogger, "log", log_with_slots))
