# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Compares the simulation with what the engine counted."""

from collections.abc import Iterable

from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError
from vllm.model_executor.layers.fused_moe.expert_slots.trace.reading import Trace
from vllm.plugins.moe_gpu_prefetch.command.tune.simulate import (
    Point,
    SimulatedLayer,
    simulate,
    totals,
)


def compare(trace: Trace, layers: Iterable[SimulatedLayer]) -> str:
    """Simulates the slots and the policy of the recorded run.

    Args:
        layers: those of the trace that made a step.

    Returns:
        What was compared, or why nothing could be, in a sentence.

    Raises:
        MoEPrefetchError: a total differs.
    """
    compared = 0
    for each in layers:
        layer = each.layer
        if layer.totals is None or layer.lost:
            continue
        counts = simulate([each], [Point(layer.num_slots, layer.policy)])
        simulated = totals(counts, layer.bytes_per_expert)
        for name, counted in layer.totals.items():
            if simulated[name] != counted:
                raise MoEPrefetchError(
                    f"{trace.path}: {layer.name}: the engine counted {counted:,} "
                    f"{name}, the simulation {simulated[name]:,}. Tune with the "
                    "version that recorded the trace, or report a bug."
                )
        compared += 1
    made = [layer for layer in trace.layers if len(layer.steps)]
    if compared == len(made):
        return (
            f"{trace.path}: the simulation equals the engine's counters exactly, in "
            f"{compared} of {compared} layers."
        )
    lost = sum(layer.lost for layer in made)
    reason = (
        f"{lost:,} steps are missing"
        if lost
        else ("its last counters are from before its last step")
    )
    what = f"only {compared} of {len(made)} layers were" if compared else "was not"
    return f"{trace.path}: {what} compared with the engine's counters: {reason}."
