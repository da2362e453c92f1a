# SPDX-License-Identifier: Apache-2.0
"""Expert parallelism: composes the map global id -> this rank's expert with the slot tables."""

import torch


class RankMap:
    """Which of the model's experts one rank holds, in the shapes that the slots need.

    Both lookups are one launch each, of shapes that do not depend on the routing, so that they can
    be captured in a CUDA graph.
    """

    def __init__(self, expert_map: torch.Tensor):
        """Args:
        expert_map: [experts of the model] integers, id on this rank, -1 = on another rank.
        """
        nobody = expert_map.new_full((1,), -1)
        # Indexed with -1, a padding row, it answers with its last entry: nobody.
        self._experts = torch.cat((expert_map, nobody))
        # A slot table with its guard in front, indexed by this, has the guard in front again.
        self._guarded = torch.cat((nobody, expert_map)).long() + 1

    def experts_here(self, topk_ids: torch.Tensor) -> torch.Tensor:
        """Global ids [tokens, top_k] -> this rank's ids, -1 for experts of other ranks."""
        return self._experts[topk_ids]

    def slots_of_all(self, guarded_table: torch.Tensor) -> torch.Tensor:
        """A wave's table as the kernel wants it under expert parallelism.

        Args:
            guarded_table: [1 + experts of this rank], -1, then the slot of each or -1.

        Returns:
            [experts of the model], the slot of each or -1; one entry in front of it lies -1, which
            the alignment finds for a padding row.
        """
        return guarded_table[self._guarded][1:]
