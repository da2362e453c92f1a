# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The elements of a row that views cover are counted as torch writes them."""

import torch

from vllm.model_executor.layers.fused_moe.expert_slots.weights.regions import (
    by_row,
    elements,
)


def test_regions_are_counted_as_torch_writes_them():
    """Views of every kind, against a tensor that they are written to."""
    shape = (3, 4, 5)
    views = [
        lambda t: t,
        lambda t: t[1],
        lambda t: t[2, 3, 4],
        lambda t: t[:, 1:3],
        lambda t: t[1:, :, ::2],
        lambda t: t.transpose(0, 2)[1:3],
        lambda t: t.transpose(1, 2)[:, 2:],
        lambda t: t.view(-1)[7:49],
        lambda t: t.view(12, 5)[3:9, 1:3],
        lambda t: t.view(-1)[3::7],
        lambda t: t.permute(2, 0, 1)[::3, :2, ::2],
    ]
    for first in views:
        for second in views:
            written, counted = (
                torch.zeros(shape, dtype=torch.bool),
                [set() for _ in range(3)],
            )
            for view in (first(written), second(written)):
                view.fill_(True)
                extents = [
                    (s, n)
                    for s, n in zip(view.stride(), view.shape, strict=True)
                    if n > 1
                ]
                extents.sort(reverse=True)
                for row, region in by_row(view.storage_offset(), tuple(extents), 20):
                    counted[row].add(region)
            got = [elements(20, frozenset(regions)) for regions in counted]
            assert got == written.flatten(1).sum(1).tolist()
