# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The flags `--moe-gpu-prefetch` and `--moe-gpu-prefetch-config`: they are parsed into
`additional_config`, checked, and settled before an engine starts."""

import argparse
import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

from vllm.config.utils import get_attr_docs
from vllm.engine.arg_utils import EngineArgs

from vllm.model_executor.layers.fused_moe.expert_slots.config import (
    OPTIONS_KEY,
    SLOTS_KEY,
    MoEPrefetchConfig,
    MoEPrefetchError,
)
from vllm.model_executor.layers.fused_moe.expert_slots.counters import (
    DIRECTORY_VARIABLE,
    open_counters_directory,
)
from vllm.model_executor.layers.fused_moe.expert_slots.refusals.arguments import (
    refuse,
    refuse_draft_slots,
)
from vllm.plugins.moe_gpu_prefetch.failures import (
    ending,
    in_one_line,
    show_refusals_in_one_line,
    this_is_the_front_end,
)
from vllm.plugins.moe_gpu_prefetch.stock.check import (
    log_shared_methods,
    objection,
    refuse_where_slots_cannot_work,
)
from vllm.plugins.moe_gpu_prefetch.stock.unsupported import with_flags
from vllm.plugins.moe_gpu_prefetch.stock.wrapping import Wrap

WORKER_EXTENSION = "vllm.plugins.moe_gpu_prefetch.worker.ExpertSlotsWorkerExtension"


def _slots(value: str) -> int | str:
    if reason := objection():
        raise argparse.ArgumentTypeError(reason)
    try:
        slots: Any = int(value)
    except ValueError:
        slots = value
    try:
        return MoEPrefetchConfig.validated(slots, {}).slots
    except MoEPrefetchError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _options(value: str) -> dict[str, Any]:
    try:
        options = json.loads(value)
        MoEPrefetchConfig.validated(1, options)
    except MoEPrefetchError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{value!r} is not JSON: {error}") from None
    return options


def _add_group(parser: argparse.ArgumentParser) -> None:
    docs = {
        name: " ".join(text.split())
        for name, text in get_attr_docs(MoEPrefetchConfig).items()
    }
    group = parser.add_argument_group("ExpertSlots", MoEPrefetchConfig.__doc__)
    group.add_argument(
        "--moe-gpu-prefetch",
        type=_slots,
        default=None,
        metavar="N|SIZE|auto",
        help=docs["slots"],
    )
    options = "\n\n".join(
        f"{name}: {text}" for name, text in docs.items() if name != "slots"
    )
    group.add_argument(
        "--moe-gpu-prefetch-config",
        type=_options,
        default=None,
        help=(
            f"Options of the expert slots.\n\n{options}\n\nShould either be a valid "
            "JSON string or JSON keys passed individually."
        ),
    )


def merge(args: argparse.Namespace) -> None:
    """Moves the flags of parsed arguments into their `additional_config`.

    Raises:
        MoEPrefetchError: it is no object, or says something else than the flags.
    """
    given = {key: getattr(args, key, None) for key in (SLOTS_KEY, OPTIONS_KEY)}
    additional = getattr(args, "additional_config", None)
    if all(value is None for value in given.values()):
        return
    if not isinstance(additional, dict | None):
        raise MoEPrefetchError(
            f"--additional-config {additional!r} is not a JSON object, so "
            "--moe-gpu-prefetch cannot be added to it. Make it an object, or drop one "
            "of the two."
        )
    merged = dict(additional or {})
    for key, value in given.items():
        if value is None:
            continue
        if merged.get(key, value) != value:
            raise MoEPrefetchError(
                f"--{key.replace('_', '-')} {value!r} contradicts additional_config "
                f"{key}={merged[key]!r}. Give one of the two."
            )
        merged[key] = value
    args.additional_config = merged


def _refuse(arguments: EngineArgs) -> None:
    """Refuses slots where they cannot work.

    Raises:
        MoEPrefetchError: slots were asked for, and cannot work in this process, or with
            the other arguments.
    """
    if MoEPrefetchConfig.of(arguments) is not None:
        refuse_where_slots_cannot_work()
        refuse(arguments)


def wraps() -> tuple[Wrap, ...]:
    """The wraps of the three methods of `EngineArgs` that see the arguments of each
    engine."""
    add_cli_args = EngineArgs.add_cli_args
    from_cli_args = EngineArgs.from_cli_args.__func__  # type: ignore[attr-defined]
    create_engine_config = EngineArgs.create_engine_config

    @functools.wraps(add_cli_args)
    def add_cli_args_with_slots(parser: Any) -> Any:
        parser = add_cli_args(parser)
        return with_flags(parser, lambda: _add_group(parser))

    @functools.wraps(from_cli_args)
    def from_cli_args_with_slots(cls: type, args: argparse.Namespace) -> EngineArgs:
        try:
            merge(args)
            engine_args = from_cli_args(cls, args)
            _refuse(engine_args)
        except MoEPrefetchError as error:
            print(in_one_line(error), file=sys.stderr)
            raise SystemExit(2) from None
        show_refusals_in_one_line()
        return engine_args

    @functools.wraps(create_engine_config)
    def create_engine_config_with_slots(
        self: EngineArgs, *args: Any, **kwargs: Any
    ) -> Any:
        _refuse(self)
        config = MoEPrefetchConfig.of(self)
        if config is None:
            return create_engine_config(self, *args, **kwargs)
        from vllm.plugins.moe_gpu_prefetch import log_line, metrics
        from vllm.plugins.moe_gpu_prefetch.start import settle

        # Each of several API servers makes this configuration, but their parent starts
        # the engines. Those may hold the memory by the time that the servers look.
        starts_engines = self._api_process_count == 1 or self._api_process_rank == -1
        if starts_engines:
            directory = open_counters_directory()
            this_is_the_front_end()
        self.worker_extension_cls = self.worker_extension_cls or WORKER_EXTENSION
        vllm_config = create_engine_config(self, *args, **kwargs)
        log_shared_methods()
        try:
            refuse_draft_slots(config, vllm_config)
            if starts_engines:
                settle(vllm_config)
                metrics.expose(directory, vllm_config)
                log_line.follow(directory, vllm_config.instance_id)
            else:
                parents = Path(os.environ[DIRECTORY_VARIABLE])
                metrics.show(parents, vllm_config)
        except MoEPrefetchError as refusal:
            raise ending(refusal) from None
        return vllm_config

    return (
        Wrap(EngineArgs, "add_cli_args", add_cli_args_with_slots),
        Wrap(EngineArgs, "from_cli_args", from_cli_args_with_slots),
        Wrap(EngineArgs, "create_engine_config", create_engine_config_with_slots),
    )
