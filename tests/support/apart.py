# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""An engine in a process of its own: for engines with workers, and for those that leave
traces in their process."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import ROOT


@dataclass(frozen=True)
class ApartRun:
    """What an engine answered.

    Attributes:
        outputs: the answers, as `engine.answers` gives them.
        counters: of each rank, by layer; empty for stock.
        residency: the expert in each slot, of each rank, by layer; empty for stock.
        metrics: what `LLM.get_metrics()` has, summed over labels.
        log: what the process printed.
    """

    outputs: list[Any]
    counters: list[dict[str, dict[str, int]]]
    residency: list[dict[str, list[int]]]
    metrics: dict[str, float]
    log: str


def run_apart(
    checkpoint: Path,
    answer: Path,
    environment: dict[str, str] | None = None,
    **options: Any,
) -> ApartRun:
    """Runs `engine.start(checkpoint, **options)` in a process of its own.

    Args:
        checkpoint: the model's directory.
        answer: a file to write, through which the process answers.
        environment: variables of the process besides this one's.
        options: of `engine.start`, and `prompts` (by default `engine.PROMPTS`) and
            `tokens` of each answer.

    Raises:
        RuntimeError: the engine did not start or end well; carries the end of its log.
    """
    # One core for each rank: without this, vLLM takes the cores of both ranks from
    # those that it believes to be free.
    environment = {
        **os.environ,
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
        **(environment or {}),
    }
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.support.apart",
            str(checkpoint),
            str(answer),
            json.dumps(options),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        env=environment,
        cwd=ROOT,
    )
    if result.returncode != 0:
        raise RuntimeError(result.stdout[-6000:])
    return ApartRun(**json.loads(answer.read_text()), log=result.stdout)


def main(checkpoint: str, answer: str, options: str) -> None:
    from tests.support.engine import PROMPTS, answers, sampling, start

    arguments = json.loads(options)
    prompts, tokens = arguments.pop("prompts", PROMPTS), arguments.pop("tokens", 12)
    llm = start(Path(checkpoint), disable_log_stats=False, **arguments)
    outputs = answers(llm.generate(prompts, sampling(tokens), use_tqdm=False))
    slotted = "slots" in arguments
    metrics: dict[str, float] = {}
    for metric in llm.get_metrics():
        metrics[metric.name] = metrics.get(metric.name, 0) + getattr(metric, "value", 0)
    found = {
        "outputs": outputs,
        "counters": llm.collective_rpc("expert_slot_counters") if slotted else [],
        "residency": llm.collective_rpc("expert_slot_residency") if slotted else [],
        "metrics": metrics,
    }
    Path(answer).write_text(json.dumps(found))
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
