# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a running engine answers about its slots:
`llm.collective_rpc("expert_slot_counters")` and
`llm.collective_rpc("expert_slot_residency")`."""

from typing import Any

import torch

from vllm.plugins.moe_gpu_prefetch.loading import all_slotted_layers


class ExpertSlotsWorkerExtension:
    """Mixed into vLLM's worker through `worker_extension_cls`."""

    def expert_slot_counters(self) -> dict[str, dict[str, int]]:
        """Totals and sizes of every slotted layer of this rank, by layer name. The keys
        of the inner dictionaries are those of `counters.TOTALS` and
        `counters.SIZES`."""
        return {
            layer.layer_name: layer.slots.counters.as_dict()
            for layer in self._slotted_layers()
        }

    def expert_slot_residency(self) -> dict[str, list[int]]:
        """The expert in each slot of every slotted layer of this rank, by layer name.
        Checked first: the tables fit each other, every slot holds its expert's bytes.

        Raises:
            AssertionError: they are not, or do not.
        """
        answer = {}
        for layer in self._slotted_layers():
            answer[layer.layer_name] = residents = layer.slots.residency()
            for name, slots in layer.slots.rows.slots.items():
                same = torch.equal(
                    slots.cpu(), layer.slots.store.tensors[name][residents]
                )
                assert same, (
                    f"{layer.layer_name}.{name}: a slot does not hold its expert"
                )
        return answer

    def _slotted_layers(self) -> list[Any]:
        return all_slotted_layers(self.vllm_config)  # type: ignore[attr-defined]
