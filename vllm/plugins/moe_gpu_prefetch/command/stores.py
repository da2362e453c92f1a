# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""`vllm-moe-prefetch stores`: the shared expert stores under a directory."""

import argparse
import json

from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError
from vllm.model_executor.layers.fused_moe.expert_slots.shared_store.catalogue import (
    remove,
    stores,
)
from vllm.model_executor.layers.fused_moe.expert_slots.sizes import gib


def list_stores(arguments: argparse.Namespace) -> int:
    """Removes the stores that `arguments` names, and prints those that are left.

    Returns:
        The exit status.

    Raises:
        MoEPrefetchError: there is no such directory, or no such store.
    """
    if not arguments.directory.is_dir():
        raise MoEPrefetchError("no such directory.")
    if arguments.remove is not None:
        for key in remove(arguments.directory, arguments.remove):
            print(f"removed {key}")
    listings = stores(arguments.directory)
    if arguments.json:
        print(json.dumps([listing.model_dump() for listing in listings], indent=2))
        return 0
    for listing in listings:
        print(
            f"{listing.key}  {listing.state:10}  {gib(listing.num_bytes):>12}  "
            f"{listing.model}"
        )
    return 0
