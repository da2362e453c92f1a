# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The training loop."""

import time
from dataclasses import dataclass
from statistics import mean

import torch
from transformers import Qwen3MoeForCausalLM, get_cosine_schedule_with_warmup

from tools.small_moe.data import Rows
from tools.small_moe.model import losses


@dataclass(frozen=True)
class Plan:
    """How a model is trained."""

    steps: int
    batch: int
    """Rows of a step."""

    rate: float
    """The highest learning rate."""

    balance: float
    """The weight of the load-balancing loss."""

    seed: int
    """Of the order of the rows."""


def train(model: Qwen3MoeForCausalLM, plan: Plan, rows: Rows) -> None:
    """AdamW with a cosine schedule. Prints a line every 50 steps."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    norms = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": 0.1},
            {"params": norms, "weight_decay": 0.0},
        ],
        lr=plan.rate,
        betas=(0.9, 0.98),
    )
    schedule = get_cosine_schedule_with_warmup(
        optimizer, min(100, plan.steps // 5), plan.steps
    )
    batches = rows.batches(plan.batch, plan.seed)
    begin = time.monotonic()
    recent: list[float] = []
    for step in range(1, plan.steps + 1):
        tokens = next(batches)
        nats, unbalanced = losses(model, tokens)
        (nats.mean() + plan.balance * unbalanced).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        recent.append(float(nats.detach().mean()))
        if step % 50 == 0 or step == plan.steps:
            seconds = time.monotonic() - begin
            print(
                f"step {step:5} of {plan.steps}: {mean(recent):.3f} nats a token, "
                f"balance {unbalanced:.2f}, {step * tokens.numel() / seconds:,.0f} "
                "tokens/s",
                flush=True,
            )
            recent.clear()
