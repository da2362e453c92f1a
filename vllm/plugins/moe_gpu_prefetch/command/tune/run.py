# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""`vllm-moe-prefetch tune`: reads traces, simulates, recommends."""

import argparse
import json
from collections.abc import Sequence

from vllm.model_executor.layers.fused_moe.expert_slots.config import MoEPrefetchError
from vllm.model_executor.layers.fused_moe.expert_slots.sizes import gib
from vllm.plugins.moe_gpu_prefetch.command.tune.advice import Advice
from vllm.plugins.moe_gpu_prefetch.command.tune.check import compare
from vllm.plugins.moe_gpu_prefetch.command.tune.report import Answer, print_answer
from vllm.plugins.moe_gpu_prefetch.command.tune.simulate import POLICIES, Point
from vllm.plugins.moe_gpu_prefetch.command.tune.speed import speed_of
from vllm.plugins.moe_gpu_prefetch.command.tune.study import Study, studies


def tune(arguments: argparse.Namespace) -> int:
    """Prints the answer, and draws it if that was asked for.

    Returns:
        The exit status.

    Raises:
        MoEPrefetchError: a trace cannot be used, the simulation differs from what the
            engine counted, or the arguments contradict each other.
    """
    if arguments.plots is not None:
        # Without matplotlib this fails, before the simulation.
        from vllm.plugins.moe_gpu_prefetch.command.tune import plots
    elif arguments.format is not None:
        raise MoEPrefetchError(f"--format {arguments.format} is of --plots DIRECTORY.")
    ranks = studies(arguments.traces)
    checks = [
        compare(trace, run.values())
        for study in ranks
        for trace, run in zip(study.traces, study.runs, strict=True)
    ]
    for study in ranks:
        study.run([Point(study.recorded[0], study.policy)])
    study = max(
        ranks,
        key=lambda study: sum(
            figures.totals["bytes_loaded"] for figures in study.figures.values()
        ),
    )
    limit = _limit(ranks, arguments)
    rows = _rows(study, arguments.slots, limit)
    allowed = [
        slots
        for slots in rows
        if (slots <= limit if limit is not None else slots < study.num_experts)
    ]
    if not allowed and limit is not None:
        raise MoEPrefetchError(
            f"--slots: no number is within the limit of {limit} slots. Add a smaller "
            "one."
        )
    study.run(Point(slots, policy) for slots in rows for policy in POLICIES)
    speed = speed_of(study.traces, arguments.link, arguments.step_time)
    advice = Advice(study, allowed or rows, speed, limit)
    of_ranks = [each.rank for each in ranks]
    given = arguments.slots is not None
    answer = Answer(study, of_ranks, rows, limit, given, speed, advice, checks)
    if arguments.plots is not None:
        drawn = plots.draw(answer, arguments.plots, arguments.format or "svg")
    if arguments.json:
        print(json.dumps(answer.as_dict(), indent=2))
        return 0
    if arguments.plots is not None:
        print(f"Plots: {', '.join(map(str, drawn))}")
    print_answer(answer)
    return 0


def _limit(ranks: Sequence[Study], arguments: argparse.Namespace) -> int | None:
    """The most slots that may be recommended; None without a limit. All ranks have the
    same number, so the one with most to hold decides.

    Raises:
        MoEPrefetchError: it is below the fewest slots that a layer can have.
    """
    least = max(study.top_k for study in ranks)
    most = max(study.num_experts for study in ranks)
    limit = arguments.max_slots
    if limit is not None and limit < least:
        raise MoEPrefetchError(
            f"--max-slots {limit}: a layer has at least {least} slots, the router's "
            "top-k."
        )
    if arguments.budget is not None:

        def memory(slots: int) -> int:
            return max(
                study.slot_bytes(slots) + study.staging_bytes(slots) for study in ranks
            )

        fitting = [n for n in range(least, most + 1) if memory(n) <= arguments.budget]
        if not fitting:
            raise MoEPrefetchError(
                f"--budget {gib(arguments.budget)}: {least} slots a layer, the fewest, "
                f"take {gib(memory(least))} with staging. Give more, or serve a "
                "smaller model."
            )
        limit = max(fitting)
    return None if limit is None else min(limit, most)


def _rows(study: Study, given: list[int] | None, limit: int | None) -> list[int]:
    """The numbers of slots of the table.

    Raises:
        MoEPrefetchError: a layer cannot have so many, or so few.
    """
    if given is None:
        return sorted({*default_rows(study), *([] if limit is None else [limit])})
    for slots in given:
        if not study.top_k <= slots <= study.num_experts:
            raise MoEPrefetchError(
                f"--slots {slots}: a layer has {study.top_k} slots, the router's "
                f"top-k, to {study.num_experts}, one for each expert."
            )
    return sorted(set(given))


def default_rows(study: Study) -> list[int]:
    """Eighths of the experts, closer where slots are few; the fewest; and those that
    were recorded."""
    experts, least = study.num_experts, study.top_k
    parts = {experts * sixteenths // 16 for sixteenths in (1, 2, 3, *range(4, 17, 2))}
    return sorted({least, *study.recorded, *(n for n in parts if n > least)})
