# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Predicts times: a step takes what it takes without loads, and what its bytes take on
the link (docs/performance.md)."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low

import torch

from vllm.model_executor.layers.fused_moe.expert_slots.capacity.link import (
    measured_bandwidth,
)
from vllm.model_executor.layers.fused_moe.expert_slots.trace.reading import Trace
from vllm.plugins.moe_gpu_prefetch.command.tune.steps import Work

_MEASURED_BYTES = 64 << 20
_UNKNOWN = "an upper bound for speeds, because the trace "


GIVEN = "given"
"""Where a figure is from: the command line."""


@dataclass(frozen=True)
class Speed:
    """What predictions are made of.

    Attributes:
        link: bytes a second from host to device.
        link_from: where that is from, in words.
        step_time: seconds of a step that loads nothing.
        step_time_from: where that is from, in words.
        decides: whether tokens a second can decide what is recommended. Otherwise the
            step time is not that of a GPU.
    """

    link: float
    link_from: str
    step_time: float
    step_time_from: str
    decides: bool = True

    def seconds(self, steps: float, num_bytes: int) -> float:
        """The time of some steps.

        Args:
            steps: how many.
            num_bytes: what they load together.
        """
        return steps * self.step_time + num_bytes / self.link

    def tokens_per_second(self, work: Work, num_bytes: int, kind: int) -> float | None:
        """Of the steps of a kind.

        Args:
            num_bytes: what these steps load together.

        Returns:
            None if there are no such steps, or if they take no time.
        """
        seconds = self.seconds(work.steps[kind], num_bytes)
        return work.tokens[kind] / seconds if work.steps[kind] and seconds else None


def speed_of(
    traces: Sequence[Trace], link: float | None, step_time: float | None
) -> Speed | None:
    """What to predict with.

    Args:
        traces: of one rank.
        link: as given, bytes a second.
        step_time: as given, seconds.

    Returns:
        None if no link is known.
    """
    measured = [trace.link for trace in traces if trace.link]
    link_from = GIVEN
    if link is None and measured:
        link, link_from = min(measured), "measured when the trace was recorded"
    if link is None:
        link, link_from = _link_of_this_machine(), "measured on this machine"
    if link is None:
        return None
    if step_time is not None:
        return Speed(link, link_from, step_time, GIVEN)
    return Speed(link, link_from, *_recorded_step_time(traces, link))


def _link_of_this_machine() -> float | None:
    if not torch.cuda.is_available():
        return None
    source = torch.empty(_MEASURED_BYTES, dtype=torch.uint8, pin_memory=True)
    return measured_bandwidth([(torch.empty_like(source, device="cuda"), source)])


def _recorded_step_time(
    traces: Sequence[Trace], link: float
) -> tuple[float, str, bool]:
    """The last three attributes of `Speed`, by the recorded steps."""
    seconds = steps = 0.0
    on_the_cpu = False
    for trace in traces:
        totals = [layer.totals for layer in trace.layers if len(layer.steps)]
        if None in totals or not trace.busy_seconds:
            return 0.0, _UNKNOWN + "does not say how long its steps took", False
        steps += median_low(each["steps"] for each in totals if each)
        seconds += trace.busy_seconds
        if trace.platform == "cpu":
            on_the_cpu = True  # its loads are copies within memory, not over a link
        else:
            loaded = sum(each["bytes_loaded"] for each in totals if each)
            seconds -= loaded / (trace.link or link)
    if on_the_cpu:
        return seconds / steps, "that of the CPU that recorded, loads included", False
    if seconds <= 0:
        return 0.0, _UNKNOWN + "has steps that took no longer than their loads", False
    return seconds / steps, "that of the recorded steps without their loads", True
