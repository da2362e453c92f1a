# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Trains a small MoE language model on text that lies on any machine with Python:

    python -m tools.train_small_moe --output DIR

It takes about ten minutes of one core. The seed and the number of steps are fixed, so
the weights depend on the text (Python's version and this commit), on the versions of
torch, transformers and tokenizers, and on the processor.
"""

import argparse
import hashlib
import json
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeForCausalLM,
)
from transformers.utils.logging import disable_progress_bar

from tools.small_moe.data import (
    END_OF_TEXT,
    END_OF_TURN,
    Rows,
    bytes_of_tokens,
    make_tokenizer,
)
from tools.small_moe.loop import Plan, train
from tools.small_moe.model import (
    Size,
    bits_per_byte,
    expert_use,
    make_model,
)
from tools.small_moe.text import DOMAINS, Texts, collect

VALIDATION_ROWS = 24


def validation(
    model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: Rows
) -> dict[str, float]:
    """Bits a byte of held-out text, by domain."""
    token_bytes = bytes_of_tokens(tokenizer)
    return {
        domain: round(
            bits_per_byte(model, rows.first(domain, VALIDATION_ROWS), token_bytes), 3
        )
        for domain in DOMAINS
    }


def routing(model: Qwen3MoeForCausalLM, rows: Rows) -> dict[str, list[float]]:
    """By layer: the least used expert's share of all choices times E (0: never used,
    1: as often as the mean), and how far prose and code differ in their use of experts
    (0: not at all, 1: they share none)."""
    prose, code = (
        expert_use(model, rows.first(d, VALIDATION_ROWS)) for d in ("prose", "code")
    )
    least = ((prose + code) / 2).min(1).values * prose.shape[1]
    apart = (prose - code).abs().sum(1) / 2
    return {
        "least_used": [round(x, 3) for x in least.tolist()],
        "prose_from_code": [round(x, 3) for x in apart.tolist()],
    }


def write(
    model: Qwen3MoeForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    facts: dict[str, Any],
    directory: Path,
) -> None:
    """The checkpoint in bfloat16, each file in one piece or not at all. Other files of
    the directory stay."""
    unfinished = directory.with_name(f"{directory.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    disable_progress_bar()
    model.generation_config = GenerationConfig(eos_token_id=model.config.eos_token_id)
    model.to(torch.bfloat16).save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    (unfinished / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    directory.mkdir(parents=True, exist_ok=True)
    for path in unfinished.iterdir():
        path.replace(directory / path.name)
    unfinished.rmdir()


def fingerprint(texts: Texts) -> str:
    """Of the training text."""
    digest = hashlib.sha256()
    for domain in DOMAINS:
        for document in texts.training[domain]:
            digest.update(document.encode() + b"\0")
    return digest.hexdigest()[:16]


@contextmanager
def one_thread() -> Iterator[None]:
    """The operators of a model this small are too short for two threads. They gain
    less than a half on an idle machine, and lose most once another program wants a
    core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.train_small_moe", description=__doc__.split("\n")[0]
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, help="the checkpoint's directory")
    add("--steps", type=int, default=2200, help="of the optimizer")
    add("--batch", type=int, default=4, help="rows of a step")
    add("--rate", type=float, default=2.5e-3, help="the highest learning rate")
    add("--balance", type=float, default=0.005, help="weight of the balancing loss")
    add("--seed", type=int, default=0)
    add("--files", type=int, help="read so many files of the standard library only")
    for name, value in vars(Size()).items():
        add(f"--{name.replace('_', '-')}", type=int, default=value)
    args = parser.parse_args(arguments)

    begin, begin_cpu = time.monotonic(), time.process_time()
    size = Size(**{name: getattr(args, name) for name in vars(Size())})
    plan = Plan(**{f.name: getattr(args, f.name) for f in fields(Plan)})
    texts = collect(args.seed, args.files)
    tokenizer = make_tokenizer(texts, size.vocabulary)
    ends = [tokenizer.convert_tokens_to_ids(t) for t in (END_OF_TURN, END_OF_TEXT)]
    training = Rows.of(tokenizer, texts.training, size.length)
    held_out = Rows.of(tokenizer, texts.held_out, size.length)
    model = make_model(size, args.seed, ends)
    parameters = sum(p.numel() for p in model.parameters())
    counted = {d: len(stream) for d, stream in training.streams.items()}
    print(f"{parameters:,} parameters; tokens of text: {counted}", flush=True)

    before = validation(model, tokenizer, held_out)
    train(model, plan, training)
    model.to(torch.bfloat16).float()  # what is measured is what is written
    after = validation(model, tokenizer, held_out)
    for domain in DOMAINS:
        print(f"{domain}: {before[domain]} bits a byte before, {after[domain]} after")
    used = routing(model, held_out)
    print(f"routers: {used}")
    facts = {
        **vars(plan),
        "parameters": parameters,
        "bits_per_byte_before": before,
        "bits_per_byte": after,
        "routing": used,
        "text": {"fingerprint": fingerprint(texts), "tokens": counted},
        "seconds": round(time.monotonic() - begin),
        "cpu_seconds": round(time.process_time() - begin_cpu),
        "processor": platform.machine(),
        "python": platform.python_version(),
        "versions": {n: version(n) for n in ("torch", "transformers", "tokenizers")},
    }
    write(model, tokenizer, facts, args.output)
    print(f"{args.output}: {facts['seconds']} s, {facts['cpu_seconds']} s of processor")
    return 0


if __name__ == "__main__":
    sys.exit(main())
