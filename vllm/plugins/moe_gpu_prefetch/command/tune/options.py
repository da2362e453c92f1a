# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The options of `vllm-moe-prefetch tune`."""

import argparse
from pathlib import Path
from typing import Any

from vllm.model_executor.layers.fused_moe.expert_slots.capacity.link import bandwidth
from vllm.plugins.moe_gpu_prefetch.command.arguments import (
    counts,
    duration,
    positive,
    size,
)


def add_parser(commands: Any) -> None:
    """Adds the subcommand to what `add_subparsers` returned."""
    parser = commands.add_parser(
        "tune",
        formatter_class=argparse.HelpFormatter,
        usage="vllm-moe-prefetch tune TRACE [TRACE ...] [options]",
        help="how many slots and which policy a recorded trace asks for",
    )
    parser.add_argument(
        "traces",
        nargs="+",
        metavar="TRACE",
        type=Path,
        help=(
            "file that --moe-gpu-prefetch-config.trace recorded; several: other ranks, "
            "or other runs of the same model"
        ),
    )
    parser.add_argument(
        "--slots",
        type=counts,
        metavar="N,N,...",
        help="rows of the table; default: a range, and the number that was recorded",
    )
    limit = parser.add_mutually_exclusive_group()
    limit.add_argument(
        "--max-slots",
        type=positive,
        metavar="N",
        help="recommend no more slots per layer than these",
    )
    limit.add_argument(
        "--budget",
        type=size,
        metavar="SIZE",
        help="recommend no more slots than fit this memory of a GPU, with staging",
    )
    parser.add_argument(
        "--link",
        type=bandwidth,
        metavar="SIZE/s",
        help=(
            "host-to-device bandwidth, like 25GB/s; default: as the trace says, or as "
            "this machine's GPU is measured"
        ),
    )
    parser.add_argument(
        "--step-time",
        type=duration,
        metavar="TIME",
        help=(
            "time of a step that loads nothing, like 12ms; default: from the trace, "
            "the time of its steps without their loads"
        ),
    )
    parser.add_argument(
        "--plots",
        type=Path,
        metavar="DIRECTORY",
        help="draw the hit rate, each layer, reuse distances and tokens/s there",
    )
    parser.add_argument(
        "--format", choices=["svg", "png"], help="of the plots; default: svg"
    )
    parser.add_argument("--json", action="store_true", help="an object, for programs")
    parser.set_defaults(run=_tune, about=None)


def _tune(arguments: argparse.Namespace) -> int:
    # Imported here: the compiler of the loops takes a second to import.
    from vllm.plugins.moe_gpu_prefetch.command.tune.run import tune

    return tune(arguments)
