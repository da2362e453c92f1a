# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The console command `vllm-moe-prefetch`: what fits, without weights and without a
GPU; and the shared expert stores of this machine."""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm.model_executor.layers.fused_moe.expert_slots.capacity.footprint import (
    CannotMeasure,
    in_words,
)
from vllm.model_executor.layers.fused_moe.expert_slots.capacity.link import (
    LinkCost,
    bandwidth,
    link_cost,
)
from vllm.model_executor.layers.fused_moe.expert_slots.capacity.planner import (
    MemoryPlanner,
    Plan,
)
from vllm.model_executor.layers.fused_moe.expert_slots.config import (
    MoEPrefetchConfig,
    MoEPrefetchError,
)
from vllm.model_executor.layers.fused_moe.expert_slots.refusals.arguments import (
    refuse_draft_slots,
)
from vllm.model_executor.layers.fused_moe.expert_slots.shared_store.store import (
    remove,
    stores,
)
from vllm.model_executor.layers.fused_moe.expert_slots.sizes import (
    GIB,
    gib,
    size_in_bytes,
)
from vllm.model_executor.layers.fused_moe.expert_slots.versions import add_serve_options
from vllm.plugins.moe_gpu_prefetch import register
from vllm.plugins.moe_gpu_prefetch.command import gpu_elsewhere
from vllm.plugins.moe_gpu_prefetch.command.gpu_elsewhere import (
    GPUS,
    UNNAMED,
    Gpu,
    gpu_called,
)
from vllm.plugins.moe_gpu_prefetch.start import expectation, planner_for
from vllm.plugins.moe_gpu_prefetch.stock.check import objection

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
    """vLLM's parser (underscores, dotted JSON keys, `--config`), with argparse's help:
    all options at once."""

    def format_help(self) -> str:
        return argparse.ArgumentParser.format_help(self)


def parser() -> argparse.ArgumentParser:
    """The command's parser. `plan` takes every engine option of `vllm serve`, and shows
    those that matter to it."""
    parser = _Parser(prog="vllm-moe-prefetch", description=__doc__)
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="{plan,stores}"
    )
    plan = commands.add_parser(
        "plan",
        aliases=[
            "serve"
        ],  # by this name vLLM's parser takes a model from a `--config` file
        prog="vllm-moe-prefetch plan",
        usage="vllm-moe-prefetch plan MODEL [options, and every option of vllm serve]",
        help="what N slots per layer cost and which N fit, from a config.json alone",
    )
    plan.add_argument(
        "--slots",
        type=_slots,
        metavar="N,N,...",
        help=(
            "rows of the table, each a number, a size like 12GiB, or auto; default: a "
            "range"
        ),
    )
    plan.add_argument(
        "--gpu",
        type=gpu_called,
        metavar="NAME",
        help=(
            f"ask about a GPU that is elsewhere: {', '.join(GPUS)}; default: this "
            f"machine's"
        ),
    )
    plan.add_argument(
        "--gpu-memory",
        type=_size,
        metavar="SIZE",
        help=(
            "the same of a GPU of which only the memory is known, as CUDA reports "
            "it: less than is published, 23.6GiB for an RTX 4090"
        ),
    )
    plan.add_argument(
        "--link",
        type=bandwidth,
        metavar="SIZE/s",
        help="host-to-device bandwidth, say 25GB/s: adds what misses cost",
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
    listing.add_argument(
        "--json", action="store_true", help="a list of objects, for programs"
    )
    listing.set_defaults(run=_stores, about="directory")
    plan.set_defaults(about="model", run=_plan, model=None)
    plan.set_defaults(load_format="dummy", skip_tokenizer_init=True)
    return parser


class _LastError(logging.Handler):
    """Keeps the errors that vLLM logs off the screen, and what the last of them
    says."""

    reason = ""

    def emit(self, record: logging.LogRecord) -> None:
        said = record.exc_info[1] if record.exc_info else record.getMessage()
        self.reason = str(said).strip().rpartition("\n")[2]


def _vllm_config(arguments: argparse.Namespace) -> tuple[VllmConfig, MoEPrefetchConfig]:
    """The configuration that `vllm serve` would make of these arguments, without expert
    slots, and what was asked of those.

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
    if (
        gpu_elsewhere.pretended is not None
    ):  # what this machine's environment says does not count
        vllm_config.cache_config.kv_cache_memory_bytes = (
            engine_args.kv_cache_memory_bytes
        )
    return vllm_config, config


def _plan(arguments: argparse.Namespace) -> int:
    """Prints the table; status 1 where nothing of it fits."""
    _check_directory(arguments.model)
    elsewhere = arguments.gpu is not None or arguments.gpu_memory is not None
    if elsewhere != (gpu_elsewhere.pretended is not None):
        raise MoEPrefetchError(
            "give --gpu and --gpu-memory on the command line, not in a file."
        )
    if elsewhere:
        gpu = arguments.gpu or Gpu(f"{gib(arguments.gpu_memory)} GPU", UNNAMED, 0)
        gpu_elsewhere.pretended = replace(
            gpu, memory=arguments.gpu_memory or gpu.memory
        )
    vllm_config, config = _vllm_config(arguments)
    planner = planner_for(vllm_config, config)
    if planner is None:
        raise MoEPrefetchError("no MoE layers, so no expert slots to plan.")
    if planner.objection and not planner.plan(planner.num_experts).fits:
        raise MoEPrefetchError(planner.objection)
    auto = _auto(planner)
    asked: list[int | str] | None = arguments.slots
    if asked is None and config.slots != "auto":
        asked = [config.slots]
    if asked is None:
        eighths = {planner.num_experts * part // 8 for part in range(1, 9)}
        asked = ["auto", planner.top_k, *eighths, *filter(None, [planner.largest()])]
    rows: dict[int, _Row] = {}
    for count in asked:
        # Where nothing fits, the least says what is missing.
        least = count == "auto" and auto is None
        plan = planner.plan(planner.smallest if least else planner.meant(count))
        row = rows.setdefault(plan.slots, _Row(plan))
        if str(count) != str(plan.slots):
            row.asked.append(str(count))
    if planner.objection:  # with a slot for every expert, layers are stock's
        rows = {
            slots: row for slots, row in rows.items() if slots == planner.num_experts
        }
        if not rows:
            raise MoEPrefetchError(planner.objection)
    if arguments.link is not None:
        for row in rows.values():
            row.cost = link_cost(arguments.link, planner.layers_with(row.plan.slots))
    shown = [row for _, row in sorted(rows.items())]
    if arguments.json:
        print(json.dumps([row.as_dict() for row in shown], indent=2))
    else:
        _print(planner, shown)
    return 0 if any(row.plan.fits for row in shown) else 1


def _check_directory(model: str) -> None:
    """Raises:
    MoEPrefetchError: it is a directory that is not there, or whose config.json is none.
    """
    directory = Path(model)
    if directory.is_absolute() and not directory.is_dir():
        raise MoEPrefetchError("no such directory.")
    config = directory / "config.json"
    if config.is_file() and not isinstance(json.loads(config.read_text()), dict):
        raise MoEPrefetchError("its config.json is not a JSON object.")


@dataclass
class _Row:
    """A row of the answer.

    Attributes:
        asked: what it was asked for by, where that was not its number of slots.
        cost: what its misses cost, if a link was given.
    """

    plan: Plan
    asked: list[str] = field(default_factory=list)
    cost: LinkCost | None = None

    def as_dict(self) -> dict[str, object]:
        answer = {**self.plan.as_dict(), "asked": self.asked}
        if self.cost is not None:
            most = self.cost.tokens_per_second if self.cost.bytes_per_token else None
            answer |= {
                "seconds_per_miss": self.cost.seconds_per_miss,
                "bytes_per_token": self.cost.bytes_per_token,
                "link_tokens_per_second": most,
            }
        return answer


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
        print(
            f"{listing.key}  {listing.state:10}  {gib(listing.num_bytes):>12}  "
            f"{listing.model}"
        )
    return 0


def _auto(planner: MemoryPlanner) -> int | None:
    try:
        return planner.auto()
    except MoEPrefetchError:
        return None


def _print(planner: MemoryPlanner, rows: Sequence[_Row]) -> None:
    limits, linked = planner.limits, rows[0].cost is not None
    console = Console(highlight=False)
    console.width = max(console.width, 90)
    if limits.host_is_device:
        console.print(ON_THE_CPU)
    table = Table(
        title=f"{planner.num_layers} MoE layers of {planner.num_experts} experts, "
        f"top-{planner.top_k}, {planner.bytes_per_expert:,} bytes each. GiB:",
        title_justify="left",
    )
    device = "memory" if limits.host_is_device else "GPU"
    columns = (
        "slots",
        "fits",
        device,
        "staging",
        "KV cache",
        "longest",
        "resident",
        "host",
    )
    for column in (*columns, "tokens/s") if linked else columns:
        table.add_column(column, justify="right")
    for row in rows:
        plan = row.plan
        most = "" if row.cost is None else f"{row.cost.tokens_per_second:,.1f}"
        cells = [
            " ".join([str(plan.slots), *row.asked]),
            "yes" if plan.fits else "no",
            *(
                f"{size / GIB:,.2f}"
                for size in (plan.gpu_bytes, plan.staging_bytes, plan.kv_cache_bytes)
            ),
            f"{plan.kv_sequences:,.1f}",
            str(plan.resident_sequences),
            f"{plan.host_bytes / GIB:,.2f}",
        ]
        table.add_row(*cells, *([most] if linked else []))
    console.print(table)
    first = rows[0].plan
    console.print(
        f"{device}: slots, staging (rows that all layers share for experts without a "
        f"slot), "
        f"{gib(first.other_weight_bytes)} of other weights, and about "
        f"{gib(first.overhead_bytes)} of intermediates "
        f"({gib(first.activation_bytes)}), CUDA "
        f"graphs ({gib(first.graph_bytes)}) and libraries "
        f"({gib(first.library_bytes)}), which are "
        "estimates. With the KV cache it shares "
        f"{limits.gpu_limit}.\n"
        f"longest: sequences of {limits.max_model_len:,} tokens that the KV cache "
        f"holds.\n"
        "resident: sequences that decode together without outgrowing the slots, if "
        "routing is "
        f"uniform. {expectation(planner)}."
    )
    about = next((row for row in rows if "auto" in row.asked), rows[0])
    if about.cost is not None:
        console.print(
            "tokens/s: the most of one sequence that its loads over the link allow, "
            f"if routing is uniform. At {about.plan.slots} slots: "
            f"{about.cost.sentence('given')} {about.cost.warning() or ''}"
        )
    refused = next((row.plan for row in rows if not row.plan.fits), None)
    if refused is not None:
        largest = planner.largest()
        answer = (
            "No N fits." if largest is None else f"The largest N that fits: {largest}."
        )
        console.print(f"{answer} {refused.slots} {refused.reason}.")
    if planner.objection:
        console.print(f"Fewer slots: {planner.objection}")


ON_THE_CPU = (
    "This machine has no GPU: answered for its CPU. --gpu 4090 asks about a GPU that "
    "is elsewhere."
)


def main() -> None:
    """Answers the command line. Standard output carries the answer alone."""
    logging.disable(logging.WARNING)
    logged = _LastError()
    logging.getLogger().addHandler(logged)
    register()
    given, about = sys.argv[1:], ""
    try:
        if reason := objection():
            raise MoEPrefetchError(reason)
        arguments = parser().parse_args(
            ["serve", *given[1:]] if given[:1] == ["plan"] else given
        )
        if arguments.about == "model":
            arguments.model = arguments.model_tag or arguments.model
            if arguments.model is None:
                raise MoEPrefetchError(
                    "name a model, by its directory or its Hugging Face id"
                )
        about = f"{getattr(arguments, arguments.about)}: "
        status = arguments.run(arguments)
    except (
        Exception
    ) as error:  # of a configuration that vLLM or transformers rejects, too
        words = (
            error.errors()[0]["msg"]
            if isinstance(error, ValidationError)
            else str(error)
        )
        words = in_words(words)
        if logged.reason and logged.reason[:40] not in words:
            words += f" ({in_words(logged.reason)})"
        if "No module named" in words:
            words += " Install it, or ask where vLLM serves this model."
        if isinstance(error, CannotMeasure) and current_platform.is_cpu():
            words += f" {ON_THE_CPU}"
        print(f"vllm-moe-prefetch: error: {about}{words}", file=sys.stderr)
        raise SystemExit(2) from None
    raise SystemExit(status)
