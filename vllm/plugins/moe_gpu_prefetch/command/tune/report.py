# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What `vllm-moe-prefetch tune` prints."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from vllm.model_executor.layers.fused_moe.expert_slots.sizes import GIB, gib
from vllm.plugins.moe_gpu_prefetch.command.tune.advice import (
    CLOSE_RATE,
    WORTH_A_GIB,
    Advice,
)
from vllm.plugins.moe_gpu_prefetch.command.tune.simulate import POLICIES, Point
from vllm.plugins.moe_gpu_prefetch.command.tune.speed import Speed
from vllm.plugins.moe_gpu_prefetch.command.tune.steps import DECODE, PREFILL
from vllm.plugins.moe_gpu_prefetch.command.tune.study import Study

NO_LINK = (
    "Speeds are not predicted: no host-to-device bandwidth is known. Give one with "
    "--link 25GB/s."
)

NO_STEP_TIME = (
    "Hit rates decide, not speeds: the time of a GPU's step is not known. Give it with "
    "--step-time 12ms."
)


@dataclass
class Answer:
    """All that is printed.

    Attributes:
        study: of the rank that loads most.
        ranks: all that have a trace.
        rows: numbers of slots.
        limit: the most that may be recommended; None without a limit.
        given: whether the rows are those of --slots.
        speed: None without predictions.
        checks: a sentence for each trace.
    """

    study: Study
    ranks: list[int]
    rows: Sequence[int]
    limit: int | None
    given: bool
    speed: Speed | None
    advice: Advice
    checks: list[str]

    def row(self, slots: int, policy: str) -> dict[str, Any]:
        """The figures of a number of slots and a policy; sizes in bytes, times in
        seconds. None: there are no such steps, or no predictions."""
        study, speed = self.study, self.speed
        figures = study.figures[Point(slots, policy)]
        work, kind = study.work, self.advice.kind
        speeds: dict[str, float | None] = {
            "step_seconds": None,
            "tokens_per_second": None,
            "prefill_tokens_per_second": None,
        }
        if speed is not None:
            loaded = figures.bytes_loaded
            if work.steps[DECODE]:
                seconds = speed.seconds(work.steps[DECODE], loaded[DECODE])
                speeds["step_seconds"] = seconds / work.steps[DECODE]
            for name, each in (
                ("tokens_per_second", DECODE),
                ("prefill_tokens_per_second", PREFILL),
            ):
                speeds[name] = speed.tokens_per_second(work, loaded[each], each)
        return {
            "hit_rate": figures.hit_rate,
            "decode_hit_rate": figures.hits[DECODE] / max(1, figures.needed[DECODE]),
            "loads_per_token": figures.loads[kind] / work.tokens[kind],
            "bytes_per_token": figures.bytes_loaded[kind] / work.tokens[kind],
            "staged_share": figures.staged_share,
            "overflow_share": figures.overflow_share,
            **speeds,
            "totals": figures.totals,
        }

    def _experts_per_step(self) -> float | None:
        """Distinct experts that a decode step of a layer needs; None without any."""
        steps = self.study.work.steps[DECODE] * len(self.study.layers)
        needed = next(iter(self.study.figures.values())).needed[DECODE]
        return needed / steps if steps else None

    def as_dict(self) -> dict[str, Any]:
        """The answer for programs."""
        study, advice = self.study, self.advice
        more = advice.next_gib
        return {
            "model": study.traces[0].model,
            "traces": [str(trace.path) for trace in study.traces],
            "checks": self.checks,
            "rank": study.rank,
            "ranks": self.ranks,
            "layers": len(study.layers),
            "experts": study.num_experts,
            "top_k": study.top_k,
            "recorded_slots": study.recorded,
            "recorded_policy": study.policy,
            "decode": {
                "steps": study.work.steps[DECODE],
                "tokens": study.work.tokens[DECODE],
                "experts_per_layer_and_step": self._experts_per_step(),
            },
            "prefill": {
                "steps": study.work.steps[PREFILL],
                "tokens": study.work.tokens[PREFILL],
            },
            "speed": self.speed and asdict(self.speed),
            "rows": [
                {
                    "slots": slots,
                    "slot_bytes": study.slot_bytes(slots),
                    "staging_bytes": study.staging_bytes(slots),
                    **{policy: self.row(slots, policy) for policy in POLICIES},
                }
                for slots in self.rows
            ],
            "recommendation": {
                "slots": advice.slots,
                "policy": advice.policy,
                "limit": self.limit,
                "flag": advice.flag,
                "reason": list(reasons(self)),
                "next_gib": more and {**asdict(more), "on_slots": more.on_slots},
                "warnings": list(advice.warnings()),
            },
        }


def print_answer(answer: Answer) -> None:
    """Prints the answer for people. The last line is the flag to use."""
    console = Console(highlight=False, markup=False, emoji=False)
    # A table that is wider than the terminal would lose columns.
    console.width = max(console.width, 100)
    study, advice, speed = answer.study, answer.advice, answer.speed
    work = study.work
    for check in answer.checks:
        console.print(check)
    if len(answer.ranks) > 1:
        console.print(
            f"{len(answer.ranks)} ranks: the figures are of rank {study.rank}, which "
            "loads most."
        )
    console.print(_table(answer))
    of = "decode" if advice.kind == DECODE else "prefill"
    recorded = " and ".join(map(str, study.recorded))
    console.print(
        f"Recorded: {work.steps[DECODE]:,.0f} decode and {work.steps[PREFILL]:,.0f} "
        f"prefill steps with {recorded} slots, {study.policy}.\n"
        "lru, lfu, Belady: hit rates of all steps. Belady knows the steps to come: no "
        f"policy hits more. The columns to its right are with {advice.policy}.\n"
        f"loads, and their bytes: for a token of the {of} steps. staged: of the loads. "
        "overflow: of the steps."
    )
    if speed is None:
        console.print(NO_LINK)
    else:
        console.print(
            f"Predicted with {speed.link / 1e9:,.1f} GB/s, {speed.link_from}, and "
            f"{speed.step_time * 1e3:,.2f} ms for a step without loads, "
            f"{speed.step_time_from}. ms, tokens/s: of decode steps. prefill: tokens/s."
        )
        if not speed.decides:
            console.print(NO_STEP_TIME)
    console.print()
    console.print(" ".join(reasons(answer)))
    for warning in advice.warnings():
        console.print(f"Warning: {warning}")
    console.print(advice.flag, soft_wrap=True)


def _table(answer: Answer) -> Table:
    study, advice, rows = answer.study, answer.advice, answer.rows
    table = Table(
        title=f"{study.traces[0].model}: {len(study.layers)} MoE layers of "
        f"{study.num_experts} experts, top-{study.top_k}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    shown = [answer.row(slots, advice.policy) for slots in rows]
    memory = _unit(study.slot_bytes(rows[-1]), {"GiB": GIB, "MiB": 1 << 20})
    loaded = _unit(max(row["bytes_per_token"] for row in shown), {"MB": 1e6, "kB": 1e3})
    speeds = ["ms", "tokens/s", "prefill"] if answer.speed else []
    hit_rates = ["lru", "lfu", "Belady"]
    for column in ("slots", memory[0], *hit_rates, "loads", loaded[0], "staged"):
        table.add_column(column, justify="right")
    for column in ("overflow", *speeds):
        table.add_column(column, justify="right")
    for slots, row in zip(rows, shown, strict=True):
        cells = [
            str(slots),
            f"{study.slot_bytes(slots) / memory[1]:,.2f}",
            *(
                f"{study.figures[Point(slots, policy)].hit_rate:.1%}"
                for policy in POLICIES
            ),
            f"{row['loads_per_token']:,.1f}",
            f"{row['bytes_per_token'] / loaded[1]:,.1f}",
            f"{row['staged_share']:.1%}",
            f"{row['overflow_share']:.1%}",
        ]
        if answer.speed:
            cells += [
                _number(row["step_seconds"], 1e3, 2),
                _number(row["tokens_per_second"], 1, 1),
                _number(row["prefill_tokens_per_second"], 1, 0),
            ]
        table.add_row(*cells)
    return table


def _unit(largest: float, units: dict[str, float]) -> tuple[str, float]:
    """The first of `units` that the largest figure of a column reaches, or the last."""
    names = list(units)
    name = next((name for name in names if largest >= units[name]), names[-1])
    return name, units[name]


def _number(value: float | None, scale: float, digits: int) -> str:
    return "" if value is None else f"{value * scale:,.{digits}f}"


def reasons(answer: Answer) -> Iterator[str]:
    """Why this is recommended, in sentences."""
    study, advice = answer.study, answer.advice
    slots, best, experts = advice.slots, advice.best, study.num_experts
    if slots == experts and answer.limit is not None:
        yield (
            f"All {experts} experts of a layer fit the limit. Serve without "
            "--moe-gpu-prefetch, which is the same."
        )
        return
    within = f"with fewer than {experts} slots"
    if answer.limit is not None:
        within = "within the limit"
    if answer.given:
        within = "of the numbers that were given"
    if advice.predicts:
        predicted = advice.tokens_per_second(slots) or 0.0
        most = advice.tokens_per_second(best) or 0.0
        of = "" if advice.kind == DECODE else " of prompts"
        yield f"{slots} slots a layer: {predicted:,.1f} tokens/s{of} are predicted."
        rule = f"whose time for all steps is within {advice.close:.0%} of the least"
        figure = f"{most:,.1f} tokens/s"
    else:
        yield (
            f"{slots} slots a layer: {advice.figures(slots).hit_rate:.1%} of the "
            "needed experts are hits."
        )
        rule = f"whose hits are within {CLOSE_RATE * 100:.0f} point of the most"
        figure = f"{advice.figures(best).hit_rate:.1%}"
    if best == slots:
        yield f"That is the most {within}, and fewer slots are not close to it."
    else:
        more = study.slot_bytes(best) - study.slot_bytes(slots)
        yield (
            f"That is the fewest {rule} {within}: {best} slots take {gib(more)} "
            f"more for {figure}."
        )
    if answer.limit is None and slots < experts:
        yield (
            f"All {experts} experts take {gib(study.slot_bytes(experts))}: if that "
            "fits, serve without --moe-gpu-prefetch. Set a limit with --budget SIZE or "
            "--max-slots N."
        )
    yield _policy(answer)
    if advice.next_gib is not None:
        yield _next_gib(answer)


def _policy(answer: Answer) -> str:
    advice, recorded = answer.advice, answer.study.policy
    if advice.policy != recorded:
        saved = advice.fewer_loads(advice.policy, recorded)
        return f"{advice.policy} loads {saved:.1%} less than {recorded} there."
    saved = advice.fewer_loads(advice.other_policy, recorded)
    if saved > 0:
        return (
            f"{advice.other_policy} loads {saved:.1%} less than {recorded} there, "
            "which is not worth a change."
        )
    if saved < 0:
        return f"{advice.other_policy} loads {-saved:.1%} more than {recorded} there."
    return f"{advice.other_policy} loads as much as {recorded} there."


def _next_gib(answer: Answer) -> str:
    more = answer.advice.next_gib
    assert more is not None
    memory = f"{gib(more.num_bytes)} more"
    gain = f"{more.loads:.1%} fewer loads"
    if more.speed is not None:
        gain += f", {more.speed:.1%} more tokens/s"
    buys = (
        f"{memory} buys {more.slots} more slot{'s' * (more.slots > 1)} a layer ({gain})"
    )
    if more.context is None:
        return f"{buys}."
    verdict = "slots" if more.on_slots else "context"
    return (
        f"{buys} or {more.context:,} tokens of KV cache: better spent on {verdict}, "
        f"by the rule that slots must gain {WORTH_A_GIB:.0%} for a GiB."
    )
