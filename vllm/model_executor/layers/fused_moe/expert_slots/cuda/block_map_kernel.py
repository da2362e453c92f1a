# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Maps the list of expert blocks of an aligned batch from experts to rows.

Some kernels split their work by the number and order of the blocks, so their bits
depend on both. For them stock aligns on expert ids, and only the list that says which
expert a block belongs to is mapped.
"""

import torch
from vllm.triton_utils import tl, triton

BLOCKS = 1024
"""Blocks that one program maps."""


def block_map_constants(experts: int) -> dict[str, int]:
    """The constants of a launch."""
    return {"E": experts, "COUNT": BLOCKS, "num_warps": 4}


# The number of blocks follows the size of the batch and does not specialise the kernel:
# serving must not wait for a compiler.
@triton.jit(do_not_specialize=["num_blocks"])
def block_map_kernel(
    blocks,  # [num_blocks] int32, experts in, rows out
    num_blocks,
    expert_to_row,  # [E] int32
    E: tl.constexpr,
    COUNT: tl.constexpr,
):
    at = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    expert = tl.load(blocks + at, mask=at < num_blocks, other=-1)
    known = (expert >= 0) & (expert < E)
    row = tl.load(expert_to_row + expert, mask=known, other=-1)
    tl.store(blocks + at, row, mask=at < num_blocks)


def map_blocks(blocks: torch.Tensor, expert_to_row: torch.Tensor) -> None:
    """Replaces each expert by its row, in one launch that can be captured.

    What lies behind the last block in use is uninitialised. It may become any row or
    -1, and is never used as an index.

    Args:
        blocks: [blocks] int32, contiguous, the expert of each block. Any other number,
            such as -1 for a block to be skipped, becomes -1.
        expert_to_row: [E] int32.
    """
    assert blocks.dtype == torch.int32 and blocks.is_contiguous()
    if count := blocks.numel():
        constants = block_map_constants(len(expert_to_row))
        block_map_kernel[(triton.cdiv(count, BLOCKS),)](
            blocks, count, expert_to_row, **constants
        )
