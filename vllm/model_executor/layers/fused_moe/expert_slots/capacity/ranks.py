# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""vLLM's parallel groups as one rank sees them, in a process that is alone.

A model's layers ask vLLM's groups for their rank and size while they are built. A real
`GroupCoordinator` cannot be made here: its constructor makes process groups, which wait
for every other rank, and communicators on a device that this machine may not have. So
the objects are made without their constructor, with the attributes that building a
model reads, and put into the globals of `parallel_state` where vLLM looks for them.
Only the measuring process does this, and it ends with its answer: an engine never sees
these groups.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from vllm.distributed import parallel_state
from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager

from vllm.model_executor.layers.fused_moe.expert_slots.replacing import replaced

_GROUPS = ("_WORLD", "_TP", "_ETP", "_PP", "_DP", "_EP", "_EPLB", "_PCP", "_DCP")
"""The globals of `parallel_state` that hold a group."""


@contextmanager
def first_rank_of(stage: int, parallel: Any) -> Iterator[None]:
    """Within, this process is the first tensor-parallel rank of a pipeline stage.

    Args:
        stage: number of the pipeline stage.
        parallel: vLLM's `ParallelConfig`, or an object with its `tensor_parallel_size`
            and `pipeline_parallel_size`.
    """
    tensor, pipeline = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    first = stage * tensor
    members = {
        "_WORLD": list(range(tensor * pipeline)),
        "_PP": list(range(0, tensor * pipeline, tensor)),
    } | {
        name: list(range(first, first + tensor))
        for name in ("_TP", "_ETP", "_EP", "_EPLB")
    }
    with ExitStack() as stack:
        for name in _GROUPS:
            group = _group(first, members.get(name, [first]))
            stack.enter_context(replaced(parallel_state, name, group))
        yield


def _group(rank: int, ranks: list[int]) -> parallel_state.GroupCoordinator:
    group = object.__new__(parallel_state.GroupCoordinator)
    group.rank, group.ranks, group.world_size = rank, ranks, len(ranks)
    group.local_rank, group.rank_in_group = rank, ranks.index(rank)
    group.device = torch.device("meta")
    process_group: Any = SimpleNamespace(
        rank=lambda: ranks.index(rank), size=lambda: len(ranks)
    )
    group.device_group = group.cpu_group = process_group
    group.device_communicator = group.mq_broadcaster = None
    group.use_device_communicator = False
    group.unique_name = f"plan:{rank}"
    return group


@contextmanager
def expert_maps_on_the_host() -> Iterator[None]:
    """Within, expert maps are made in host memory. Under expert parallelism a layer
    reads the values of its map, and the meta device has no values."""
    stock = ExpertMapManager.__init__

    def on_the_host(self: ExpertMapManager, *args: Any, **kwargs: Any) -> None:
        with torch.device("cpu"):
            stock(self, *args, **kwargs)

    with replaced(ExpertMapManager, "__init__", on_the_host):
        yield
