# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""`make demo`: the small MoE model of `small_moe/`, served from 16 expert slots and by
stock vLLM, asked the same; prints both answers' equality and what the slots did. Exit
status 1 if anything differs. Stock's answers are kept, so that a second run starts one
server only."""

import hashlib
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from openai import OpenAI
from rich.console import Console
from rich.table import Table

from tests.support import ROOT
from tests.support.server import Server, start, stop, wait

MODEL = ROOT / "examples" / "small_moe"
SLOTS = 16
QUESTIONS = ("What may I do with the Work?", "What is an expert slot?")
PROSE = 'The "with" statement is used to'
CODE = "def __init__(self, name, value):"
console = Console()


def ask(client: OpenAI) -> dict[str, Any]:
    """Chat, streaming chat, and completions of prose and of code; all greedy."""
    allowed, slot = ([{"role": "user", "content": text}] for text in QUESTIONS)
    chat = client.chat.completions.create(
        model="sample", messages=allowed, max_tokens=48, temperature=0
    )
    stream = client.chat.completions.create(
        model="sample", messages=slot, max_tokens=48, temperature=0, stream=True
    )
    pieces = [event.choices[0].delta.content or "" for event in stream if event.choices]
    prose, code = (
        client.completions.create(
            model="sample", prompt=prompt, max_tokens=48, temperature=0, logprobs=3
        ).choices[0]
        for prompt in (PROSE, CODE)
    )
    logprobs = code.logprobs
    return {
        "chat": chat.choices[0].message.content,
        "streaming": "".join(pieces),
        "prose": prose.text,
        "code": code.text,
        "logprobs": (logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs),
    }


def stock_answers_file(work: Path) -> Path:
    """Where in `work` stock's answers are kept, by what they depend on: the versions,
    the checkpoint, this file and the machine's processor."""
    key = hashlib.sha256(Path(__file__).read_bytes())
    for text in (
        version("vllm"),
        version("torch"),
        version("transformers"),
        platform.processor(),
    ):
        key.update(text.encode())
    for weights in sorted(MODEL.glob("*.safetensors")):
        key.update(weights.read_bytes())
    return work / f"stock-{key.hexdigest()[:16]}.json"


def main() -> int:
    work = ROOT / ".demo"
    work.mkdir(exist_ok=True)
    kept = stock_answers_file(work)
    common = ("--max-model-len", "512", "--enforce-eager")
    console.print(f"vllm serve examples/small_moe --moe-gpu-prefetch {SLOTS}")
    servers: list[Server] = []
    try:
        servers.append(
            start(MODEL, work / "slots.log", *common, "--moe-gpu-prefetch", str(SLOTS))
        )
        if kept.exists():
            console.print(
                f"(stock vLLM was asked before: its answers are in {kept.name})"
            )
        else:
            console.print("... and stock vLLM beside it")
            servers.append(start(MODEL, work / "stock.log", *common))
        with console.status("starting vLLM ...") as status:
            for server in servers:
                wait(
                    server, tick=lambda s: status.update(f"starting vLLM ... {s:.0f} s")
                )
        # Through JSON, both of them, so that what is compared has one form.
        slotted, *asked = (json.loads(json.dumps(ask(s.client()))) for s in servers)
        metrics = servers[0].metrics()
    finally:
        for server in servers:
            stop(server)
    if asked:
        kept.write_text(json.dumps(asked[0]))
    stock = json.loads(kept.read_text())

    different = [name for name in slotted if slotted[name] != stock[name]]
    answers = Table("request", "answer from slots", "equal to stock", title="Answers")
    for name, answer in slotted.items():
        shown = (
            answer
            if isinstance(answer, str)
            else f"{len(answer[0])} tokens, top 3 each"
        )
        answers.add_row(
            name, repr(shown), "no" if name in different else "yes, bit for bit"
        )
    console.print(answers)

    def total(name: str) -> int:
        return int(metrics[f"vllm:moe_prefetch_{name}"])

    config = json.loads((MODEL / "config.json").read_text())
    slots = total("slots") // config["num_hidden_layers"]
    experts = config["num_local_experts"]
    facts = Table("what", "value", title="Expert slots")
    facts.add_row("slots per MoE layer", f"{slots} of {experts} experts")
    facts.add_row("resident share", f"{total('slot_bytes') / total('store_bytes'):.0%}")
    facts.add_row("hit rate", f"{total('hits_total') / total('needed_total'):.1%}")
    facts.add_row("loads", f"{total('loads_total')}")
    facts.add_row("bytes loaded", f"{total('bytes_loaded_total'):,}")
    facts.add_row(
        "overflow steps", f"{total('overflow_steps_total')} of {total('steps_total')}"
    )
    console.print(facts)
    console.print(
        "equal" if not different else f"[red]DIFFERENT: {', '.join(different)}"
    )
    return bool(different)


if __name__ == "__main__":
    sys.exit(main())
