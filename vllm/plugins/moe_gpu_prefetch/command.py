# SPDX-License-Identifier: Apache-2.0
"""The console command `vllm-moe-prefetch`: what fits, without weights and without a GPU; and the
shared expert stores of this machine."""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import ByteSize, TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm.model_executor.layers.fused_moe.expert_slots.config import (
    MoEPrefetchConfig,
    MoEPrefetchError,
)
from vllm.model_executor.layers.fused_moe.expert_slots.memory_plan import (
    GIB,
    MemoryPlanner,
    Plan,
    gib,
)
from vllm.model_executor.layers.fused_moe.expert_slots.shared_store import remove, stores
from vllm.plugins.moe_gpu_prefetch import register
from vllm.plugins.moe_gpu_prefetch.compatibility import objection
from vllm.plugins.moe_gpu_prefetch.planning import expectation, planner_for

_SHOWN = {
    "--dtype",
    "--gpu-memory-utilization",
    "--kv-cache-memory-bytes",
    "--max-model-len",
    "--max-num-batched-tokens",
    "--max-num-seqs",
    "--pipeline-parallel-size",
    "--quantization",
    "--tensor-parallel-size",
}


def _size(value: str) -> int:
    try:
        return int(TypeAdapter(ByteSize).validate_python(value))
    except ValidationError:
        raise argparse.ArgumentTypeError(f"{value!r} is not a size like 24GiB or 40GB") from None


def _slot_counts(value: str) -> list[int]:
    counts = value.split(",")
    if not all(count.strip().isdecimal() and int(count) > 0 for count in counts):
        raise argparse.ArgumentTypeError(f"{value!r} is not a list of counts like 16,32,64")
    return [int(count) for count in counts]


class _Parser(FlexibleArgumentParser):
    """vLLM's parser (dotted JSON keys, `--config`), with argparse's help: all options at once."""

    def format_help(self) -> str:
        return argparse.ArgumentParser.format_help(self)


def parser() -> argparse.ArgumentParser:
    """The command's parser. `plan` takes every engine option of `vllm serve`, and shows those that
    matter to it."""
    parser = argparse.ArgumentParser(prog="vllm-moe-prefetch", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    plan = commands.add_parser(
        "plan",
        usage="vllm-moe-prefetch plan MODEL [options, and every engine option of vllm serve]",
        help="what N slots per layer cost and which N fit, from a config.json alone",
    )
    plan.add_argument("model_tag", metavar="MODEL", help="directory with a config.json")
    plan.add_argument(
        "--slots", type=_slot_counts, metavar="N,N,...", help="rows of the table; default: a range"
    )
    plan.add_argument(
        "--gpu-memory",
        type=_size,
        metavar="SIZE",
        help="memory of each GPU, say 24GiB, of a machine that is elsewhere; default: this machine",
    )
    plan.add_argument("--json", action="store_true", help="a list of objects, for programs")
    own = list(plan._actions)
    EngineArgs.add_cli_args(plan)
    for action in plan._actions:
        if action not in own and not _SHOWN.intersection(action.option_strings):
            action.help = argparse.SUPPRESS
    plan._action_groups = [
        group
        for group in plan._action_groups
        if any(action.help != argparse.SUPPRESS for action in group._group_actions)
    ]
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
        help="remove these stores, or all; a server that has attached one keeps it",
    )
    listing.add_argument("--json", action="store_true", help="a list of objects, for programs")
    listing.set_defaults(run=_stores, about="directory")
    plan.set_defaults(about="model_tag", run=_plan, load_format="dummy", skip_tokenizer_init=True)
    return parser


def _vllm_config(arguments: argparse.Namespace) -> VllmConfig:
    """The configuration `vllm serve` would make of these arguments, without expert slots."""
    arguments.model = arguments.model_tag
    if arguments.tensor_parallel_size * arguments.pipeline_parallel_size > 1:
        arguments.distributed_executor_backend = "mp"  # as no ranks are started
    engine_args = EngineArgs.from_cli_args(arguments)
    vllm_config = engine_args.create_engine_config(UsageContext.OPENAI_API_SERVER)
    if arguments.gpu_memory is not None:  # what this machine's environment says does not count
        vllm_config.cache_config.kv_cache_memory_bytes = engine_args.kv_cache_memory_bytes
    return vllm_config


def _plan(arguments: argparse.Namespace) -> None:
    if reason := objection():
        raise MoEPrefetchError(reason)
    options = arguments.moe_gpu_prefetch_config or {}
    arguments.moe_gpu_prefetch = arguments.moe_gpu_prefetch_config = None
    config = MoEPrefetchConfig.validated("auto", options)
    planner = planner_for(_vllm_config(arguments), config, arguments.gpu_memory)
    if planner is None:
        raise MoEPrefetchError("no MoE layers, so no expert slots to plan.")
    auto, counts = _auto(planner), arguments.slots
    if counts is None:
        eighths = {planner.num_experts * part // 8 for part in range(1, 9)}
        counts = {planner.top_k, *eighths, *filter(None, (auto, planner.largest()))}
    plans = {plan.slots: plan for plan in map(planner.plan, sorted(counts))}
    if arguments.json:
        print(json.dumps([plan.as_dict() for plan in plans.values()], indent=2))
    else:
        _print(planner, list(plans.values()), auto)


def _stores(arguments: argparse.Namespace) -> None:
    if not arguments.directory.is_dir():
        raise MoEPrefetchError("no such directory")
    if arguments.remove is not None:
        for key in remove(arguments.directory, arguments.remove):
            print(f"removed {key}")
    listings = stores(arguments.directory)
    if arguments.json:
        print(json.dumps([listing.model_dump() for listing in listings], indent=2))
        return
    for listing in listings:
        print(f"{listing.key}  {listing.state:10}  {gib(listing.num_bytes):>12}  {listing.model}")


def _auto(planner: MemoryPlanner) -> int | None:
    try:
        return planner.auto()
    except MoEPrefetchError:
        return None


def _print(planner: MemoryPlanner, plans: Sequence[Plan], auto: int | None) -> None:
    limits = planner.limits
    table = Table(
        title=f"{planner.num_layers} MoE layers of {planner.num_experts} experts, "
        f"top-{planner.top_k}, {planner.bytes_per_expert:,} bytes each. GiB:",
        title_justify="left",
    )
    for column in ("slots", "fits", "GPU", "staging", "KV cache", "longest", "resident", "host"):
        table.add_column(column, justify="right")
    for plan in plans:
        table.add_row(
            str(plan.slots) + (" auto" if plan.slots == auto else ""),
            "yes" if plan.fits else "no",
            *(
                f"{size / GIB:,.2f}"
                for size in (plan.gpu_bytes, plan.staging_bytes, plan.kv_cache_bytes)
            ),
            f"{plan.kv_sequences:,.1f}",
            str(plan.resident_sequences),
            f"{plan.host_bytes / GIB:,.2f}",
        )
    console = Console(highlight=False)
    console.print(table)
    first = plans[0]
    console.print(
        f"GPU: slots, staging (rows that all layers share for experts without a slot), "
        f"{gib(first.other_weight_bytes)} of other weights, and about "
        f"{gib(first.overhead_bytes)} of intermediates and runtime. With the KV cache it shares "
        f"{limits.gpu_limit}.\n"
        f"longest: sequences of {limits.max_model_len:,} tokens that the KV cache holds.\n"
        "resident: sequences that decode together without outgrowing the slots, if routing is "
        f"uniform. {expectation(planner)}."
    )
    refused = next((plan for plan in plans if not plan.fits), None)
    if refused is not None:
        console.print(
            f"The largest N that fits: {planner.largest()}. {refused.slots} {refused.reason}."
        )


def main() -> None:
    """Entry point. Standard output carries the answer alone."""
    logging.disable(logging.WARNING)
    register()
    arguments = parser().parse_args()
    try:
        arguments.run(arguments)
    except (MoEPrefetchError, ValueError, OSError) as error:
        about = getattr(arguments, arguments.about)
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        print(f"vllm-moe-prefetch: error: {about}: {reason}", file=sys.stderr)
        raise SystemExit(2) from None
