# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What `vllm-moe-prefetch plan` prints."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from vllm.model_executor.layers.fused_moe.expert_slots.capacity.link import LinkCost
from vllm.model_executor.layers.fused_moe.expert_slots.capacity.plan import CapacityPlan
from vllm.model_executor.layers.fused_moe.expert_slots.capacity.planner import (
    CapacityPlanner,
)
from vllm.model_executor.layers.fused_moe.expert_slots.sizes import GIB, gib
from vllm.plugins.moe_gpu_prefetch.start import expectation

ON_THE_CPU = (
    "This machine has no GPU, so this is the answer for its CPU. Ask about a GPU on "
    "another machine with --gpu 4090."
)


@dataclass
class Row:
    """A row of the answer.

    Attributes:
        asked: the sizes or `auto` that mean this number of slots.
        cost: what its misses cost, if a link was given.
    """

    plan: CapacityPlan
    asked: list[str] = field(default_factory=list)
    cost: LinkCost | None = None

    def as_dict(self) -> dict[str, object]:
        """The row for programs; sizes in bytes, times in seconds."""
        answer = {**self.plan.as_dict(), "asked": self.asked}
        if self.cost is not None:
            most = self.cost.tokens_per_second if self.cost.bytes_per_token else None
            answer |= {
                "seconds_per_miss": self.cost.seconds_per_miss,
                "bytes_per_token": self.cost.bytes_per_token,
                "link_tokens_per_second": most,
            }
        return answer


def print_table(planner: CapacityPlanner, rows: Sequence[Row]) -> None:
    """Prints the answer for people."""
    limits, linked = planner.limits, rows[0].cost is not None
    console = Console(highlight=False)
    console.width = max(console.width, 90)
    if limits.host_is_device:
        console.print(ON_THE_CPU)
    table = Table(
        title=f"{planner.num_layers} MoE layers of {planner.num_experts} experts, "
        f"top-{planner.top_k}, {planner.bytes_per_expert:,} bytes each. GiB:",
        title_justify="left",
    )
    device = "memory" if limits.host_is_device else "GPU"
    columns = (
        "slots",
        "fits",
        device,
        "staging",
        "KV cache",
        "longest",
        "resident",
        "host",
    )
    for column in (*columns, "tokens/s") if linked else columns:
        table.add_column(column, justify="right")
    for row in rows:
        plan = row.plan
        most = "" if row.cost is None else f"{row.cost.tokens_per_second:,.1f}"
        cells = [
            " ".join([str(plan.slots), *row.asked]),
            "yes" if plan.fits else "no",
            *(
                f"{size / GIB:,.2f}"
                for size in (plan.gpu_bytes, plan.staging_bytes, plan.kv_cache_bytes)
            ),
            f"{plan.kv_sequences:,.1f}",
            str(plan.resident_sequences),
            f"{plan.host_bytes / GIB:,.2f}",
        ]
        table.add_row(*cells, *([most] if linked else []))
    console.print(table)
    first = rows[0].plan
    console.print(
        f"{device}: slots, staging (rows that all layers share for experts without a "
        f"slot), {gib(first.other_weight_bytes)} of other weights, and about "
        f"{gib(first.overhead_bytes)} of intermediates "
        f"({gib(first.activation_bytes)}), CUDA graphs ({gib(first.graph_bytes)}) and "
        f"libraries ({gib(first.library_bytes)}), which are estimates. With the KV "
        f"cache it shares {limits.gpu_limit}.\n"
        f"longest: sequences of {limits.max_model_len:,} tokens that the KV cache "
        "holds.\n"
        "resident: sequences that decode together without outgrowing the slots, if "
        f"routing is uniform. {expectation(planner)}."
    )
    about = next((row for row in rows if "auto" in row.asked), rows[0])
    if about.cost is not None:
        console.print(
            "tokens/s: the most of one sequence that its loads over the link allow, "
            f"if routing is uniform. At {about.plan.slots} slots: "
            f"{about.cost.sentence('given')} {about.cost.warning() or ''}"
        )
    refused = next((row.plan for row in rows if not row.plan.fits), None)
    if refused is not None:
        largest = planner.largest()
        answer = (
            "No N fits." if largest is None else f"The largest N that fits: {largest}."
        )
        console.print(f"{answer} {refused.slots} {refused.reason}.")
    if planner.objection:
        console.print(f"Fewer slots: {planner.objection}")
