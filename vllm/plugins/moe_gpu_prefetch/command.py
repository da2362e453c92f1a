# SPDX-License-Identifier: Apache-2.0
"""The console command `vllm-moe-prefetch`: what fits, without weights and without a GPU; and the
shared expert stores of this machine."""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import ValidationError
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
from vllm.model_executor.layers.fused_moe.expert_slots.footprint import in_words
from vllm.model_executor.layers.fused_moe.expert_slots.link import LinkCost, bandwidth, link_cost
from vllm.model_executor.layers.fused_moe.expert_slots.memory_plan import MemoryPlanner, Plan
from vllm.model_executor.layers.fused_moe.expert_slots.shared_store import remove, stores
from vllm.model_executor.layers.fused_moe.expert_slots.sizes import GIB, gib, size_in_bytes
from vllm.model_executor.layers.fused_moe.expert_slots.versions import add_serve_options
from vllm.plugins.moe_gpu_prefetch import gpu_elsewhere, register
from vllm.plugins.moe_gpu_prefetch.compatibility import objection
from vllm.plugins.moe_gpu_prefetch.conflicts import refuse_draft_slots
from vllm.plugins.moe_gpu_prefetch.gpu_elsewhere import GPUS, UNNAMED, Gpu, gpu_called
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
        return size_in_bytes(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


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
    """vLLM's parser (underscores, dotted JSON keys, `--config`), with argparse's help: all options
    at once."""

    def format_help(self) -> str:
        return argparse.ArgumentParser.format_help(self)


def parser() -> argparse.ArgumentParser:
    """The command's parser. `plan` takes every engine option of `vllm serve`, and shows those that
    matter to it."""
    parser = _Parser(prog="vllm-moe-prefetch", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{plan,stores}")
    plan = commands.add_parser(
        "plan",
        aliases=["serve"],  # by this name vLLM's parser takes a model from a `--config` file
        prog="vllm-moe-prefetch plan",
        usage="vllm-moe-prefetch plan MODEL [options, and every option of vllm serve]",
        help="what N slots per layer cost and which N fit, from a config.json alone",
    )
    plan.add_argument(
        "--slots",
        type=_slots,
        metavar="N,N,...",
        help="rows of the table, each a number, a size like 12GiB, or auto; default: a range",
    )
    plan.add_argument(
        "--gpu",
        type=gpu_called,
        metavar="NAME",
        help=f"ask about a GPU that is elsewhere: {', '.join(GPUS)}; default: this machine's",
    )
    plan.add_argument(
        "--gpu-memory",
        type=_size,
        metavar="SIZE",
        help="the same of a GPU of which only the memory is known, say 24GiB",
    )
    plan.add_argument(
        "--link",
        type=bandwidth,
        metavar="SIZE/s",
        help="host-to-device bandwidth, say 25GB/s: adds what misses cost",
    )
    plan.add_argument("--json", action="store_true", help="a list of objects, for programs")
    own = list(plan._actions)
    add_serve_options(plan)
    for action in plan._actions:
        if action.dest == "model_tag":
            action.metavar, action.help = "MODEL", "directory with a config.json"
        elif action not in own and not _SHOWN.intersection(action.option_strings):
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
    plan.set_defaults(about="model", run=_plan, model=None)
    plan.set_defaults(load_format="dummy", skip_tokenizer_init=True)
    return parser


class _LastError(logging.Handler):
    """Keeps the errors that vLLM logs off the screen, and what the last of them says."""

    reason = ""

    def emit(self, record: logging.LogRecord) -> None:
        said = record.exc_info[1] if record.exc_info else record.getMessage()
        self.reason = str(said).strip().rpartition("\n")[2]


def _vllm_config(arguments: argparse.Namespace) -> tuple[VllmConfig, MoEPrefetchConfig]:
    """The configuration that `vllm serve` would make of these arguments, without expert slots, and
    what was asked of those.

    Raises:
        MoEPrefetchError: the engine would refuse them.
    """
    if arguments.tensor_parallel_size * arguments.pipeline_parallel_size > 1:
        arguments.distributed_executor_backend = "mp"  # as no ranks are started
    if arguments.moe_gpu_prefetch is None:
        arguments.moe_gpu_prefetch = "auto"
    engine_args = EngineArgs.from_cli_args(arguments)
    config = MoEPrefetchConfig.from_additional_config(engine_args.additional_config)
    assert config is not None
    engine_args.additional_config = {}
    vllm_config = engine_args.create_engine_config(UsageContext.OPENAI_API_SERVER)
    refuse_draft_slots(config, vllm_config)
    if gpu_elsewhere.pretended is not None:  # what this machine's environment says does not count
        vllm_config.cache_config.kv_cache_memory_bytes = engine_args.kv_cache_memory_bytes
    return vllm_config, config


def _plan(arguments: argparse.Namespace) -> int:
    """Prints the table; status 1 where nothing of it fits."""
    elsewhere = arguments.gpu is not None or arguments.gpu_memory is not None
    assert elsewhere == (gpu_elsewhere.pretended is not None), "the entry point is console.main"
    if elsewhere:
        gpu = arguments.gpu or Gpu(f"{gib(arguments.gpu_memory)} GPU", UNNAMED, 0)
        gpu_elsewhere.pretended = replace(gpu, memory=arguments.gpu_memory or gpu.memory)
    vllm_config, config = _vllm_config(arguments)
    planner = planner_for(vllm_config, config)
    if planner is None:
        raise MoEPrefetchError("no MoE layers, so no expert slots to plan.")
    if planner.objection:
        raise MoEPrefetchError(planner.objection)
    auto = _auto(planner)
    asked: list[int | str] | None = arguments.slots
    if asked is None and config.slots != "auto":
        asked = [config.slots]
    if asked is None:
        eighths = {planner.num_experts * part // 8 for part in range(1, 9)}
        asked = [planner.top_k, *eighths, *filter(None, (auto, planner.largest()))]
    if auto is None:  # nothing fits: the least says what is missing
        asked = [planner.smallest if count == "auto" else count for count in asked]
    counts = {planner.meant(count) for count in asked}
    plans = {plan.slots: plan for plan in map(planner.plan, sorted(counts))}
    costs = None
    if arguments.link is not None:
        costs = {slots: link_cost(arguments.link, planner.layers_with(slots)) for slots in plans}
    if arguments.json:
        print(json.dumps([_as_dict(plan, costs) for plan in plans.values()], indent=2))
    else:
        _print(planner, list(plans.values()), auto, costs)
    return 0 if any(plan.fits for plan in plans.values()) else 1


def _as_dict(plan: Plan, costs: dict[int, LinkCost] | None) -> dict[str, object]:
    if costs is None:
        return plan.as_dict()
    cost = costs[plan.slots]
    most = cost.tokens_per_second if cost.bytes_per_token else None
    return plan.as_dict() | {
        "seconds_per_miss": cost.seconds_per_miss,
        "bytes_per_token": cost.bytes_per_token,
        "link_tokens_per_second": most,
    }


def _stores(arguments: argparse.Namespace) -> int:
    if not arguments.directory.is_dir():
        raise MoEPrefetchError("no such directory")
    if arguments.remove is not None:
        for key in remove(arguments.directory, arguments.remove):
            print(f"removed {key}")
    listings = stores(arguments.directory)
    if arguments.json:
        print(json.dumps([listing.model_dump() for listing in listings], indent=2))
        return 0
    for listing in listings:
        print(f"{listing.key}  {listing.state:10}  {gib(listing.num_bytes):>12}  {listing.model}")
    return 0


def _auto(planner: MemoryPlanner) -> int | None:
    try:
        return planner.auto()
    except MoEPrefetchError:
        return None


def _print(
    planner: MemoryPlanner,
    plans: Sequence[Plan],
    auto: int | None,
    costs: dict[int, LinkCost] | None,
) -> None:
    limits = planner.limits
    table = Table(
        title=f"{planner.num_layers} MoE layers of {planner.num_experts} experts, "
        f"top-{planner.top_k}, {planner.bytes_per_expert:,} bytes each. GiB:",
        title_justify="left",
    )
    for column in ("slots", "fits", "GPU", "staging", "KV cache", "longest", "resident", "host"):
        table.add_column(column, justify="right")
    if costs is not None:
        table.add_column("link", justify="right")
    for plan in plans:
        most = [] if costs is None else [f"{costs[plan.slots].tokens_per_second:,.1f}"]
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
            *most,
        )
    console = Console(highlight=False)
    console.print(table)
    first = plans[0]
    console.print(
        f"GPU: slots, staging (rows that all layers share for experts without a slot), "
        f"{gib(first.other_weight_bytes)} of other weights, and about "
        f"{gib(first.overhead_bytes)} of intermediates ({gib(first.activation_bytes)}), CUDA "
        f"graphs ({gib(first.graph_bytes)}) and libraries ({gib(first.library_bytes)}), which are "
        "estimates. With the KV cache it shares "
        f"{limits.gpu_limit}.\n"
        f"longest: sequences of {limits.max_model_len:,} tokens that the KV cache holds.\n"
        "resident: sequences that decode together without outgrowing the slots, if routing is "
        f"uniform. {expectation(planner)}."
    )
    if costs is not None:
        shown = next((plan for plan in plans if plan.slots == auto), plans[-1])
        cost = costs[shown.slots]
        console.print(
            "link: the most tokens a second of one sequence that its loads allow, if routing is "
            f"uniform. At {shown.slots} slots: {cost.sentence('given')} {cost.warning() or ''}"
        )
    refused = next((plan for plan in plans if not plan.fits), None)
    if refused is not None:
        largest = planner.largest()
        answer = "No N fits." if largest is None else f"The largest N that fits: {largest}."
        console.print(f"{answer} {refused.slots} {refused.reason}.")


def main() -> None:
    """Answers the command line. Standard output carries the answer alone."""
    logging.disable(logging.WARNING)
    logged = _LastError()
    logging.getLogger().addHandler(logged)
    register()
    if reason := objection():
        print(f"vllm-moe-prefetch: error: {reason}", file=sys.stderr)
        raise SystemExit(2)
    given = sys.argv[1:]
    arguments = parser().parse_args(["serve", *given[1:]] if given[:1] == ["plan"] else given)
    if arguments.about == "model":
        arguments.model = arguments.model_tag or arguments.model
    about = getattr(arguments, arguments.about)
    try:
        if about is None:
            raise MoEPrefetchError("name a model, by its directory or its Hugging Face id")
        status = arguments.run(arguments)
    except Exception as error:  # of a configuration that vLLM or transformers rejects, too
        words: object = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        cause = f" ({in_words(logged.reason)})" if logged.reason else ""
        print(f"vllm-moe-prefetch: error: {about}: {in_words(words)}{cause}", file=sys.stderr)
        raise SystemExit(2) from None
    raise SystemExit(status)
