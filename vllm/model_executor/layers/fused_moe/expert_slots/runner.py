# SPDX-License-Identifier: Apache-2.0
"""The runner seam: reaches the layers whose model brings its own `RoutedExperts` class."""

from typing import Any

from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

from vllm.model_executor.layers.fused_moe.expert_slots.routed_experts import slotted


class ExpertSlotsRunnerMixin:
    """Gives slots to the routed experts of the runner it is mixed into, once both are built."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        slotted(self.routed_experts)  # type: ignore[attr-defined]


class SlottedMoERunner(ExpertSlotsRunnerMixin, MoERunner):
    """Stands in for stock's `MoERunner`; acts as stock where no slots were asked for."""
