# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Routing for benchmarks on random weights, which route almost uniformly where real
models do not.

`skewed` draws each token's experts without replacement, expert e with odds 1 / (e + 1)
** EXPONENT. The exponent is calibrated: one sequence, 128 experts top-8, LRU over 51
slots (40 % residency) hits 92 %, within the 90-95 % published for Qwen3-30B-A3B. The
draw has no topics: all sequences of a batch favour the same experts, so batches
overflow less than real ones. `python -m benchmarks.routing` prints the hit rates.
"""

import argparse

import torch
from rich.console import Console
from rich.table import Table

EXPONENT = 1.8
STRATEGIES = {"uniform": 0.0, "skewed": EXPONENT}


def draw(
    tokens: int, experts: int, top_k: int, exponent: float, **where
) -> torch.Tensor:
    """[tokens, top_k] distinct expert ids, int64; by the Gumbel top-k trick (Kool et
    al., 2019, arXiv 1903.06059). `where` goes to torch.rand: device, generator."""
    odds = (
        torch.arange(1, experts + 1, device=where.get("device")).float().log()
        * -exponent
    )
    uniform = torch.rand(tokens, experts, **where).clamp_(1e-20, 1 - 1e-7)
    return (odds - (-uniform.log()).log()).topk(top_k).indices


def register() -> None:
    """Makes VLLM_MOE_ROUTING_SIMULATION_STRATEGY=uniform and =skewed known in this
    process."""
    from vllm.model_executor.layers.fused_moe.router.routing_simulator_router import (
        RoutingSimulator,
        RoutingStrategy,
    )

    class Draw(RoutingStrategy):
        def __init__(self, exponent: float):
            self._exponent = exponent

        def route_tokens(self, hidden_states, router_logits, top_k, indices_type=None):
            tokens, experts = router_logits.shape
            ids = draw(
                tokens, experts, top_k, self._exponent, device=hidden_states.device
            )
            weights = torch.full(ids.shape, 1 / top_k, device=ids.device)
            return weights, ids.to(indices_type or torch.int32)

    for name, exponent in STRATEGIES.items():
        RoutingSimulator.register_strategy(name, Draw(exponent))


def hit_rate(
    exponent: float,
    slots: int,
    batch: int,
    policy: str,
    steps: int = 1000,
    warm_up: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> float:
    """Hit rate of one layer of 128 experts top-8, by the decisions of the CPU
    platform.

    Args:
        warm_up: steps that are not counted; a tenth of `steps` if not given.
        dtype: of the random numbers that the ids are drawn from.
    """
    from vllm.model_executor.layers.fused_moe.expert_slots.decisions.policy import (
        ExpertHistory,
    )
    from vllm.model_executor.layers.fused_moe.expert_slots.decisions.step import (
        ResidencyTables,
        plan_step,
    )

    generator = torch.Generator().manual_seed(0)
    tables, history = ResidencyTables(128, slots), ExpertHistory(128, policy, 128)
    plans = [
        plan_step(
            tables,
            history,
            draw(batch, 128, 8, exponent, generator=generator, dtype=dtype).numpy(),
        )
        for _ in range(steps)
    ]
    counted = plans[steps // 10 if warm_up is None else warm_up :]
    return sum(plan.hits for plan in counted) / sum(plan.needed for plan in counted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--steps", type=int, default=1000, help="of each layer (default: 1000)"
    )
    steps = parser.parse_args().steps
    table = Table("routing", "policy", "N", *(f"batch of {b}" for b in (1, 8, 32)))
    for name, exponent in STRATEGIES.items():
        for policy in ("lru", "lfu"):
            for slots in (96, 64, 51, 32):
                rates = [
                    f"{hit_rate(exponent, slots, b, policy, steps):.1%}"
                    for b in (1, 8, 32)
                ]
                table.add_row(name, policy, str(slots), *rates)
    Console().print(table)


if __name__ == "__main__":
    main()
