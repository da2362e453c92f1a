# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Records which experts the small model needs, for one request at a time and for
several together. `examples/small_moe/small_moe.trace` is from

    python -m tools.small_moe.record FILE --together 1 8
"""

import argparse
import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1")

from tests.support import ROOT
from tools.small_moe.text import DOMAINS, collect
from vllm import LLM, SamplingParams

MODEL = "examples/small_moe"
"""Below the repository: the trace keeps the name, and no machine's path."""

SLOTS = 16
REQUESTS = {1: 18, 8: 48, 25: 100}
"""Requests at a time, and how many in all."""

PROMPT, ANSWER = 160, 80  # characters, tokens


def prompts(count: int) -> list[str]:
    """Beginnings of held-out prose, code and questions, in turn."""
    held_out = collect(seed=0).held_out
    found = []
    for number in range(-(-count // len(DOMAINS))):
        for domain in DOMAINS:
            texts = [text for text in held_out[domain] if len(text) > PROMPT]
            found.append(texts[number * 7 % len(texts)][:PROMPT])
    return list(islice(found, count))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument(
        "--together", type=int, nargs="+", choices=REQUESTS, default=[1, 8]
    )
    given = parser.parse_args(arguments)
    file = given.file.absolute()
    os.chdir(ROOT)
    llm = LLM(
        MODEL,
        additional_config={
            "moe_gpu_prefetch": SLOTS,
            "moe_gpu_prefetch_config": {"trace": str(file)},
        },
        max_num_seqs=max(given.together),
        enforce_eager=True,
        enable_prefix_caching=False,
    )
    sampling = SamplingParams(
        temperature=0.8, seed=0, max_tokens=ANSWER, ignore_eos=True
    )
    texts = iter(prompts(sum(REQUESTS[count] for count in given.together)))
    for count in given.together:
        for _ in range(REQUESTS[count] // count):
            llm.generate([*islice(texts, count)], sampling, use_tqdm=False)
    llm.llm_engine.engine_core.shutdown()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
