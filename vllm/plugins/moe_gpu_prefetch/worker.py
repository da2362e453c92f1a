# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a running engine answers about its slots:
`llm.collective_rpc("expert_slot_counters")` and
`llm.collective_rpc("expert_slot_residency")`."""

from typing import Any

import torch

from vllm.model_executor.layers.fused_moe.expert_slots.layer import slotted_layers


def all_slotted_layers(vllm_config: Any) -> list[Any]:
    """The MoE layers with slots of this worker, of the model and of its draft."""
    return slotted_layers(
        vllm_config.compilation_config.static_forward_context.values()
    )


class ExpertSlotsWorkerExtension:
    """Mixed into vLLM's worker through `worker_extension_cls`."""

    def expert_slot_counters(self) -> dict[str, dict[str, int]]:
        """Totals and sizes of every slotted layer of this rank, by layer name. The keys
        of the inner dictionaries are those of `counters.TOTALS` and
        `counters.SIZES`."""
        return {
            layer.layer_name: layer.slot_manager.counters.as_dict()
            for layer in self._slotted_layers()
        }

    def expert_slot_residency(self) -> dict[str, list[int]]:
        """The expert in each slot of every slotted layer of this rank, by layer name.
        Checked first: the tables fit each other, and each slot holds the bytes of its
        expert.

        Raises:
            AssertionError: a table or a slot is wrong.
        """
        answer = {}
        for layer in self._slotted_layers():
            answer[layer.layer_name] = residents = layer.slot_manager.residency()
            for name, slots in layer.slot_manager.rows.slot_rows.items():
                same = torch.equal(
                    slots.cpu(), layer.slot_manager.store.tensors[name][residents]
                )
                assert same, (
                    f"{layer.layer_name}.{name}: a slot does not hold its expert"
                )
        return answer

    def _slotted_layers(self) -> list[Any]:
        return all_slotted_layers(self.vllm_config)  # type: ignore[attr-defined]
