# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What is published of the routing of real models, and the same of the odds."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from benchmarks.policies.replay import Needs, Rule, loads
from benchmarks.routing.odds import Odds, stream


@dataclass(frozen=True)
class Model:
    """Figures of one model, of its sequences as the source decoded them.

    Attributes:
        experts: E.
        top_k: of the router.
        sequences: how many.
        length: tokens of each.
        empty: whether each sequence began with an empty cache. If not, they followed
            each other, and the first eight steps are not counted.
        rules: the simulated rules by name.
        hits: hit rates by rule, batch and slots.
        unions: mean of distinct experts a step by batch.
        repeated: share of a token's experts that the sequence's last token needed too.
        covering: experts that get 90 % of the tokens of many texts.
    """

    experts: int
    top_k: int
    sequences: int
    length: int
    empty: bool
    rules: dict[str, Rule]
    hits: dict[tuple[str, int, int], float]
    unions: dict[int, float]
    repeated: float | None = None
    covering: float | None = None


ENGINE = {"lru": Rule("lru"), "lfu": Rule("lfu")}
"""The engine's policies, as they are by default."""

MODELS = {
    # github.com/weiran0129/vLLM-MoE-Logger, a trace: 25 prompts of GSM8K in one batch,
    # layers 0, 8, 12, 18 and 23. The mean of the layers by our own simulation.
    "topics-qwen1.5": Model(
        experts=60,
        top_k=4,
        sequences=25,
        length=82,
        empty=False,
        rules={"lru": Rule("lru"), "lfu": Rule("lfu", half_life=128)},
        hits={
            **{("lru", 1, 15): 0.308, ("lru", 1, 30): 0.567, ("lru", 1, 45): 0.813},
            **{("lru", 8, 15): 0.277, ("lru", 8, 30): 0.539, ("lru", 8, 45): 0.779},
            **{("lfu", 1, 15): 0.346, ("lfu", 1, 30): 0.606, ("lfu", 1, 45): 0.826},
            **{("lfu", 8, 15): 0.295, ("lfu", 8, 30): 0.554, ("lfu", 8, 45): 0.802},
        },
        unions={2: 7.8, 8: 23.1, 16: 35.8, 25: 45.2},
    ),
    # github.com/gajsanders/moe-trace, docs/findings/006 and 007: 25 prompts of five
    # kinds, all layers. Its `lfu` counts for ever and keeps what was needed most, the
    # step's experts included. The experts that cover: mcp-tool-shop-org.github.io/
    # gpu-container/handbook/derisk, about 1,000 tokens of prose, code and mathematics.
    "topics-qwen3": Model(
        experts=128,
        top_k=8,
        sequences=25,
        length=129,
        empty=True,
        rules={
            "lru": Rule("lru"),
            "lfu": Rule("lfu", half_life=1 << 17, admission="worth"),
            "belady": Rule("belady"),
        },
        hits={
            **{("lru", 1, 8): 0.424, ("lru", 1, 16): 0.647},
            **{("lru", 1, 32): 0.810, ("lru", 1, 64): 0.918},
            **{("lfu", 1, 16): 0.615, ("lfu", 1, 32): 0.795, ("lfu", 1, 64): 0.917},
            **{("belady", 1, 16): 0.784, ("belady", 1, 32): 0.888},
            ("belady", 1, 64): 0.929,
        },
        unions={},
        repeated=0.427,
        covering=65,
    ),
}
"""By the strategy that is calibrated to it. No union of a batch of Qwen3-30B-A3B is
published."""


def rate(needs: list[Needs], slots: int, rule: Rule, empty: bool, skip: int) -> float:
    """Hit rate of all together, without the first `skip` steps of each."""
    needed = sum(int(each.sizes[skip:].sum()) for each in needs)
    missed = sum(int(loads(each, slots, rule, empty)[skip:].sum()) for each in needs)
    return 1 - missed / needed


def drawn(model: Model, odds: Odds, layers: int = 4) -> Model:
    """The figures of `model`, of sequences that are drawn by `odds`."""

    @torch.no_grad()
    def needs(batch: int) -> list[Needs]:
        groups, result = model.sequences // batch, []
        for layer in range(layers):
            shape = (batch, groups, model.length, layer)
            ids = stream(odds, model.experts, model.top_k, *shape).numpy()
            parts = np.split(ids, groups) if model.empty else [ids]
            result += [Needs.of(part, model.experts) for part in parts]
        return result

    by_batch = {batch: needs(batch) for _, batch, _ in model.hits}
    hits = {
        (name, batch, slots): rate(
            by_batch[batch],
            slots,
            model.rules[name],
            model.empty,
            0 if model.empty else 8,
        )
        for name, batch, slots in model.hits
    }
    unions = {
        batch: float(np.mean([each.sizes.mean() for each in needs(batch)]))
        for batch in model.unions
    }
    result = replace(model, hits=hits, unions=unions)
    if model.repeated:
        tokens = [
            each.experts.reshape(-1, model.length, model.top_k) for each in by_batch[1]
        ]
        ids = np.concatenate(tokens)
        again = (ids[:, 1:, :, None] == ids[:, :-1, None, :]).any(-1)
        first = ids[:, : 1000 // model.sequences].reshape(layers, -1)
        counts = [np.bincount(some, minlength=model.experts) for some in first]
        shares = [np.sort(count)[::-1].cumsum() / count.sum() for count in counts]
        covering = float(np.mean([(share < 0.9).sum() + 1 for share in shares]))
        result = replace(result, repeated=float(again.mean()), covering=covering)
    return result


def figures(model: Model) -> dict[str, float]:
    """All figures by what they say; shares are below 1."""
    result = {
        f"{rule}, batch of {batch}, N = {slots}": value
        for (rule, batch, slots), value in model.hits.items()
    }
    result |= {f"union of {batch}": value for batch, value in model.unions.items()}
    if model.repeated and model.covering:
        result["experts of the last token too"] = model.repeated
        result["experts with 90 % of all tokens"] = model.covering
    return result


def distance(model: Model, odds: Odds) -> float:
    """Root of the sum of squared errors: of shares as they are, of counts relative."""
    published, ours = figures(model), figures(drawn(model, odds))
    errors = [
        (ours[name] - value) / (1 if value < 1 else value)
        for name, value in published.items()
    ]
    return float(np.square(errors).sum() ** 0.5)


def calibrate(
    model: Model, odds: Odds, say: Callable[[Odds, float], None] = lambda *_: None
) -> Odds:
    """Better odds near `odds`: each parameter moves up and down by a step as long as
    that helps, and the steps halve."""
    best = distance(model, odds)
    steps: dict[str, float] = {"fixed": 0.2, "moving": 0.2, "length": 8, "shared": 0.1}
    while steps["shared"] > 0.01:
        before = best
        for name, step in steps.items():
            for move in (step, -step):
                value = getattr(odds, name) + move
                value = max(1, round(value)) if name == "length" else max(0.0, value)
                tried = replace(
                    odds, **{name: min(value, 1) if name == "shared" else value}
                )
                if tried != odds and (now := distance(model, tried)) < best:
                    odds, best = tried, now
                    say(odds, best)
        if best == before:
            steps = {name: step / 2 for name, step in steps.items()}
    return odds
