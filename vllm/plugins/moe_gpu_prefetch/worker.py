# SPDX-License-Identifier: Apache-2.0
"""What a running engine answers about its slots: `llm.collective_rpc("expert_slot_counters")`."""

from vllm.model_executor.layers.fused_moe.expert_slots.routed_experts import ExpertSlotsMixin


class ExpertSlotsWorkerExtension:
    """Mixed into vLLM's worker through `worker_extension_cls`."""

    def expert_slot_counters(self) -> dict[str, dict[str, int]]:
        """Totals and sizes of every slotted layer of this rank, by layer name. The keys of the
        inner dictionaries are those of `counters.TOTALS` and `counters.SIZES`."""
        return {
            module.layer_name: module.slots.counters.as_dict()
            for module in self.get_model().modules()  # type: ignore[attr-defined]
            if isinstance(module, ExpertSlotsMixin) and module.slots is not None
        }
