# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Makes vLLM's routing simulation draw by our odds:
VLLM_MOE_ROUTING_SIMULATION_STRATEGY=NAME, after `register()` in the same process.

A strategy is given no sequences. They are found where attention finds them: a row's
request by `query_start_loc`, its position by `seq_lens`, and the request's name is the
first block of its KV cache, which it keeps for its life. A prefix from the cache brings
its sequence's topic along.
"""

import functools
from typing import Any

import torch

from benchmarks.routing.odds import STRATEGIES, Odds, draw


class Rows:
    """The sequence and the position of each row of the step, in memory that stays in
    place, because CUDA graphs read it.

    Attributes:
        sequences: [max_num_batched_tokens] int64.
        positions: the same.
        layer: MoE layers that have drawn in this step.
    """

    def __init__(self) -> None:
        self.layer = 0
        self.sequences = self.positions = self._numbers = torch.empty(0)

    def begin(self, attention: Any, vllm_config: Any) -> None:
        """Opens a step. Everything is queued on the device and nothing waits for it. A
        graph that is captured with this call replays it.

        Raises:
            RuntimeError: the attention backend does not say which row is whose.
        """
        self.layer = 0
        if not len(self.sequences):
            self._allocate(vllm_config.scheduler_config.max_num_batched_tokens)
        if not attention:
            return
        wanted = ("query_start_loc", "seq_lens", "block_table", "num_actual_tokens")
        layers = attention.values() if isinstance(attention, dict) else ()
        for metadata in layers:
            if all(hasattr(metadata, name) for name in wanted):
                break
        else:
            kinds = sorted({type(each).__name__ for each in layers})
            raise RuntimeError(
                f"the rows of a step are not known from {kinds or 'two batches a step'}"
                ": take an attention backend with query_start_loc, seq_lens and "
                "block_table, as TRITON_ATTN, and no --enable-dbo."
            )
        starts, tokens = metadata.query_start_loc, metadata.num_actual_tokens
        numbers = self._numbers[:tokens]
        request = torch.searchsorted(starts, numbers, right=True) - 1
        request = request.clamp_(0, len(starts) - 2)
        behind = (
            starts[1:][request] - numbers
        )  # tokens of the step to the request's end
        self.positions[:tokens] = metadata.seq_lens[request] - behind
        self.sequences[:tokens] = metadata.block_table[:, 0][request]

    def _allocate(self, tokens: int) -> None:
        from vllm.platforms import current_platform

        device = current_platform.device_type
        self.sequences = torch.zeros(tokens, dtype=torch.int64, device=device)
        self.positions = torch.zeros_like(self.sequences)
        self._numbers = torch.arange(tokens, dtype=torch.int32, device=device)


def register() -> None:
    """Makes the names of `STRATEGIES` known to vLLM in this process."""
    from vllm.model_executor.layers.fused_moe.router.routing_simulator_router import (
        RoutingSimulator,
        RoutingStrategy,
    )

    from vllm import forward_context

    rows, create = Rows(), forward_context.create_forward_context

    @functools.wraps(create)
    def created(attn_metadata: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        rows.begin(attn_metadata, vllm_config)
        return create(attn_metadata, vllm_config, *args, **kwargs)

    forward_context.create_forward_context = created

    class Draw(RoutingStrategy):
        def __init__(self, odds: Odds):
            self._odds = odds

        def route_tokens(self, hidden_states, router_logits, top_k, indices_type=None):
            tokens, experts = router_logits.shape
            layer, rows.layer = rows.layer, rows.layer + 1
            sequences, positions = rows.sequences[:tokens], rows.positions[:tokens]
            ids = draw(self._odds, sequences, positions, layer, experts, top_k)
            weights = torch.full(ids.shape, 1 / top_k, device=ids.device)
            return weights, ids.to(indices_type or torch.int32)

    for name, odds in STRATEGIES.items():
        RoutingSimulator.register_strategy(name, Draw(odds))
