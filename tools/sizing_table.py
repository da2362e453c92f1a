# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Prints the tables of docs/sizing.md: what `auto` takes, and what is left for the KV
cache. Published models in bfloat16 on five GPUs, quantised checkpoints on GPUs of 12,
16 and 24 GB, and the largest models. Minutes, no GPU, no weights."""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from tools.sizing_models import (
    LARGE_MODELS,
    MODELS,
    QUANTISED_MODELS,
    config_of,
)

GPUS = ("RTX 4090", "RTX 5090", "A100-40", "A100-80", "H100")
OPTIONS = ("--max-model-len", "8192", "--max-num-seqs", "16")

SMALL_GPUS = ("RTX 3060", "RTX 4060 Ti 16GB", "RTX 3090", "RTX 4090")
FEW_OPTIONS = ("--max-model-len", "8192", "--max-num-seqs", "4")
"""For the other tables: the owner of one small GPU serves few requests at a time."""

LARGE_GPUS = ("RTX 5090", "RTX A6000", "A100-80", "RTX PRO 6000")


def write(name: str, directory: Path) -> Path:
    """The config.json of a model of one of the tables, in a directory of its name."""
    config_of(name).save_pretrained(directory / name)
    return directory / name


def plan(model: Path, gpu: str, options: Iterable[str]) -> dict:
    """The capacity plan of what `auto` takes on `gpu`, or of the smallest number of
    slots if nothing fits. It ends the process with the command's error if there is no
    answer."""
    command = Path(sys.executable).with_name("vllm-moe-prefetch")
    result = subprocess.run(
        [
            *(str(command), "plan", str(model), "--gpu", gpu),
            *("--slots", "auto", "--json", *options),
        ],
        capture_output=True,
        text=True,
    )
    if result.returncode not in (0, 1):
        sys.exit(result.stderr)
    (answer,) = json.loads(result.stdout)
    return answer


def cell(model: Path, gpu: str) -> str:
    """Of the first table: slots; the GPU's memory but the KV cache + the KV cache."""
    found = plan(model, gpu, OPTIONS)
    if not found["fits"]:
        return "does not fit"
    gpu_gib, kv_gib = (_gib(found[name]) for name in ("gpu_bytes", "kv_cache_bytes"))
    return f"{found['slots']} of {found['experts']}; {gpu_gib} + {kv_gib}"


def quantised_cell(found: dict) -> str:
    """Of the other tables, from a plan: slots; slots and staging + the KV cache; host
    memory of the experts."""
    if not found["fits"]:
        without_parts = re.sub(r" \([^)]*\)", "", found["reason"])
        return f"does not fit: {without_parts}"
    experts = found["slot_bytes"] + found["staging_bytes"]
    room = f"{_gib(experts)} + {_gib(found['kv_cache_bytes'])}"
    if found["slots"] == found["experts"]:
        return f"fits whole; {room}; none"
    host = _gib(found["host_bytes"])
    return f"{found['slots']} of {found['experts']}; {room}; {host}"


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f}"


def print_table(
    models: Iterable[str], gpus: tuple[str, ...], cell: Callable[[Path, str], str]
) -> None:
    print(f"| model | {' | '.join(gpus)} |")
    print(f"|---|{'---|' * len(gpus)}")
    with tempfile.TemporaryDirectory() as place:
        for name in models:
            model = write(name, Path(place))
            cells = " | ".join(cell(model, gpu) for gpu in gpus)
            print(f"| {name} | {cells} |", flush=True)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    print_table(MODELS, GPUS, cell)
    for models, gpus in ((QUANTISED_MODELS, SMALL_GPUS), (LARGE_MODELS, LARGE_GPUS)):
        print()
        print_table(
            models,
            gpus,
            lambda model, gpu: quantised_cell(plan(model, gpu, FEW_OPTIONS)),
        )


if __name__ == "__main__":
    main()
