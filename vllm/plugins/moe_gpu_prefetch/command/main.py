# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The command `vllm-moe-prefetch`: what fits, without weights and without a GPU; what a
recorded trace asks for; and the shared expert stores of this machine."""

import argparse
import logging
import sys
from pathlib import Path

from pydantic import ValidationError
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm.model_executor.layers.fused_moe.expert_slots.capacity.footprint import (
    CannotMeasure,
    in_words,
)
from vllm.model_executor.layers.fused_moe.expert_slots.capacity.link import bandwidth
from vllm.model_executor.layers.fused_moe.expert_slots.config import (
    MoEPrefetchConfig,
    MoEPrefetchError,
)
from vllm.model_executor.layers.fused_moe.expert_slots.versions import add_serve_options
from vllm.plugins.moe_gpu_prefetch import register
from vllm.plugins.moe_gpu_prefetch.command.arguments import size
from vllm.plugins.moe_gpu_prefetch.command.gpu_elsewhere import GPUS, gpu_called
from vllm.plugins.moe_gpu_prefetch.command.plan import plan_model
from vllm.plugins.moe_gpu_prefetch.command.stores import list_stores
from vllm.plugins.moe_gpu_prefetch.command.table import ON_THE_CPU
from vllm.plugins.moe_gpu_prefetch.command.tune import options
from vllm.plugins.moe_gpu_prefetch.stock.check import refuse_where_slots_cannot_work

_SHOWN = {
    "--config",
    "--dtype",
    "--enforce-eager",
    "--gpu-memory-utilization",
    "--kv-cache-memory-bytes",
    "--max-model-len",
    "--max-num-batched-tokens",
    "--max-num-seqs",
    "--moe-gpu-prefetch",
    "--moe-gpu-prefetch-config",
    "--pipeline-parallel-size",
    "--quantization",
    "--tensor-parallel-size",
}


def _slots(value: str) -> list[int | str]:
    counts = [count.strip() for count in value.split(",")]
    try:
        given = [int(count) if count.isdecimal() else count for count in counts]
        return [MoEPrefetchConfig.validated(count, {}).slots for count in given]
    except MoEPrefetchError:
        raise argparse.ArgumentTypeError(
            f"{value!r} is not a list of counts, sizes or auto, like 16,32,12GiB,auto"
        ) from None


class _Parser(FlexibleArgumentParser):
    """vLLM's parser (underscores, dotted JSON keys, `--config`) with argparse's help,
    which shows all options at once."""

    def format_help(self) -> str:
        return argparse.ArgumentParser.format_help(self)


def parser() -> argparse.ArgumentParser:
    """The command's parser. `plan` takes every engine option of `vllm serve`, and shows
    those that matter to it."""
    parser = _Parser(prog="vllm-moe-prefetch", description=__doc__)
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="{plan,tune,stores}"
    )
    plan = commands.add_parser(
        "plan",
        # By this name vLLM's parser takes a model from a `--config` file.
        aliases=["serve"],
        prog="vllm-moe-prefetch plan",
        usage="vllm-moe-prefetch plan MODEL [options, and every option of vllm serve]",
        help="what N slots per layer cost and which N fit, from a config.json alone",
    )
    plan.add_argument(
        "--slots",
        type=_slots,
        metavar="N,N,...",
        help=(
            "rows of the table, each a number, a size like 12GiB, or auto; default: "
            "--moe-gpu-prefetch, or a range"
        ),
    )
    plan.add_argument(
        "--gpu",
        type=gpu_called,
        metavar="NAME",
        help=(
            f"answer for a GPU on another machine: {', '.join(GPUS)}; default: this "
            "machine's"
        ),
    )
    plan.add_argument(
        "--gpu-memory",
        type=size,
        metavar="SIZE",
        help=(
            "answer for a GPU with this much memory as CUDA reports it, which is less "
            "than is published: 23.6GiB for an RTX 4090"
        ),
    )
    plan.add_argument(
        "--link",
        type=bandwidth,
        metavar="SIZE/s",
        help="host-to-device bandwidth, like 25GB/s: adds what misses cost",
    )
    plan.add_argument(
        "--json", action="store_true", help="a list of objects, for programs"
    )
    own = list(plan._actions)
    add_serve_options(plan)
    for action in plan._actions:
        if action.dest == "model_tag":
            action.metavar = "MODEL"
            action.help = "directory with a config.json, or a Hugging Face id"
        elif action not in own and not _SHOWN.intersection(action.option_strings):
            action.help = argparse.SUPPRESS
    plan._action_groups = [
        group
        for group in plan._action_groups
        if any(action.help != argparse.SUPPRESS for action in group._group_actions)
    ]
    options.add_parser(commands)
    listing = commands.add_parser(
        "stores",
        usage="vllm-moe-prefetch stores DIRECTORY [--remove [KEY ...]] [--json]",
        help="the shared expert stores under a directory, and how to remove them",
    )
    listing.add_argument("directory", metavar="DIRECTORY", type=Path)
    listing.add_argument(
        "--remove",
        nargs="*",
        metavar="KEY",
        help="remove these stores, or all; a server keeps a store that it has attached",
    )
    listing.add_argument(
        "--json", action="store_true", help="a list of objects, for programs"
    )
    listing.set_defaults(run=list_stores, about="directory")
    plan.set_defaults(about="model", run=plan_model, model=None)
    plan.set_defaults(load_format="dummy", skip_tokenizer_init=True)
    return parser


class _LastError(logging.Handler):
    """Takes the errors that vLLM logs, so that they are not printed, and keeps what the
    last of them says."""

    reason = ""

    def emit(self, record: logging.LogRecord) -> None:
        said = record.exc_info[1] if record.exc_info else record.getMessage()
        self.reason = str(said).strip().rpartition("\n")[2]


def main() -> None:
    """Answers the command line. Standard output carries the answer and nothing else; an
    error is one line on standard error, and the status is 2."""
    logging.disable(logging.WARNING)
    logged = _LastError()
    logging.getLogger().addHandler(logged)
    register()
    given, about = sys.argv[1:], ""
    try:
        refuse_where_slots_cannot_work()
        arguments = parser().parse_args(
            ["serve", *given[1:]] if given[:1] == ["plan"] else given
        )
        if arguments.about == "model":
            arguments.model = arguments.model_tag or arguments.model
            if arguments.model is None:
                raise MoEPrefetchError(
                    "name a model by its directory or its Hugging Face id."
                )
        if arguments.about is not None:
            about = f"{getattr(arguments, arguments.about)}: "
        status = arguments.run(arguments)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:  # vLLM and transformers reject configurations, too
        first = (
            error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        )
        words = in_words(first)
        if logged.reason and logged.reason[:40] not in words:
            words += f" ({in_words(logged.reason)})"
        if "No module named" in words:
            words += " Install it, or run the command where vLLM serves this model."
        if isinstance(error, CannotMeasure) and current_platform.is_cpu():
            words += f" {ON_THE_CPU}"
        print(f"vllm-moe-prefetch: error: {about}{words}", file=sys.stderr)
        raise SystemExit(2) from None
    raise SystemExit(status)
