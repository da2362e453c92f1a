# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""`vllm-moe-prefetch plan`: what N slots of a model cost, and which N fit."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.usage.usage_lib import UsageContext

from vllm.model_executor.layers.fused_moe.expert_slots.capacity.link import link_cost
from vllm.model_executor.layers.fused_moe.expert_slots.capacity.planner import (
    CapacityPlanner,
)
from vllm.model_executor.layers.fused_moe.expert_slots.config import (
    OPTIONS_KEY,
    SLOTS_KEY,
    MoEPrefetchConfig,
    MoEPrefetchError,
)
from vllm.model_executor.layers.fused_moe.expert_slots.refusals.arguments import (
    refuse,
    refuse_draft_slots,
)
from vllm.model_executor.layers.fused_moe.expert_slots.sizes import gib
from vllm.plugins.moe_gpu_prefetch.command import gpu_elsewhere
from vllm.plugins.moe_gpu_prefetch.command.gpu_elsewhere import UNNAMED, Gpu
from vllm.plugins.moe_gpu_prefetch.command.table import Row, print_table
from vllm.plugins.moe_gpu_prefetch.flag import merge
from vllm.plugins.moe_gpu_prefetch.start import planner_for


def _vllm_config(arguments: argparse.Namespace) -> tuple[VllmConfig, MoEPrefetchConfig]:
    """The configuration that `vllm serve` would make of these arguments without expert
    slots, and the request for slots in them, by default `auto`.

    Raises:
        MoEPrefetchError: the engine would refuse them.
    """
    if arguments.tensor_parallel_size * arguments.pipeline_parallel_size > 1:
        arguments.distributed_executor_backend = "mp"  # as no ranks are started
    asked, given = arguments.moe_gpu_prefetch, arguments.additional_config
    if asked is None and isinstance(given, dict):
        asked = given.get(SLOTS_KEY)
    if asked is None:
        arguments.moe_gpu_prefetch = "auto"
    elif arguments.slots is not None:
        raise MoEPrefetchError(
            f"--slots {','.join(map(str, arguments.slots))} and --moe-gpu-prefetch "
            f"{asked} both name numbers of slots. Give one of the two."
        )
    merge(arguments)
    # vLLM gets the arguments without the request: the command refuses in its own words.
    request, ours = arguments.additional_config, (SLOTS_KEY, OPTIONS_KEY)
    others = {key: value for key, value in request.items() if key not in ours}
    arguments.moe_gpu_prefetch = arguments.moe_gpu_prefetch_config = None
    arguments.additional_config = others
    engine_args = EngineArgs.from_cli_args(arguments)
    engine_args.additional_config = request
    config = MoEPrefetchConfig.of(engine_args)
    assert config is not None
    engine_args.additional_config = others
    refuse(engine_args)
    vllm_config = engine_args.create_engine_config(UsageContext.OPENAI_API_SERVER)
    refuse_draft_slots(config, vllm_config)
    if gpu_elsewhere.pretended is not None:
        # This machine's environment may have set it.
        vllm_config.cache_config.kv_cache_memory_bytes = (
            engine_args.kv_cache_memory_bytes
        )
    return vllm_config, config


def plan_model(arguments: argparse.Namespace) -> int:
    """Prints the table.

    Returns:
        The exit status: 0, or 1 if no row of the table fits.

    Raises:
        MoEPrefetchError: the model cannot be served from slots, or the arguments
            contradict each other.
    """
    _check_directory(arguments.model)
    elsewhere = arguments.gpu is not None or arguments.gpu_memory is not None
    if elsewhere != (gpu_elsewhere.pretended is not None):
        raise MoEPrefetchError(
            "--gpu and --gpu-memory are not read from a file. Give them on the command "
            "line."
        )
    if elsewhere:
        gpu = arguments.gpu or Gpu(f"{gib(arguments.gpu_memory)} GPU", UNNAMED, 0)
        gpu_elsewhere.pretended = replace(
            gpu, memory=arguments.gpu_memory or gpu.memory
        )
    vllm_config, config = _vllm_config(arguments)
    planner = planner_for(vllm_config, config)
    if planner is None:
        raise MoEPrefetchError("no MoE layers, so there are no expert slots to plan.")
    if planner.objection and not planner.plan(planner.num_experts).fits:
        raise MoEPrefetchError(planner.objection)
    auto = _auto(planner)
    asked: list[int | str] | None = arguments.slots
    if asked is None and config.slots != "auto":
        asked = [config.slots]
    if asked is None:
        eighths = {planner.num_experts * part // 8 for part in range(1, 9)}
        asked = ["auto", planner.top_k, *eighths, *filter(None, [planner.largest()])]
    rows: dict[int, Row] = {}
    for count in asked:
        # If nothing fits, the smallest number shows what is missing.
        least = count == "auto" and auto is None
        plan = planner.plan(planner.smallest if least else planner.meant(count))
        row = rows.setdefault(plan.slots, Row(plan))
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
        print_table(planner, shown)
    return 0 if any(row.plan.fits for row in shown) else 1


def _check_directory(model: str) -> None:
    """Refuses a model's directory that cannot be read as one.

    Raises:
        MoEPrefetchError: the directory does not exist, or its config.json is no object.
    """
    directory = Path(model)
    if directory.is_absolute() and not directory.is_dir():
        raise MoEPrefetchError("no such directory.")
    config = directory / "config.json"
    if config.is_file() and not isinstance(json.loads(config.read_text()), dict):
        raise MoEPrefetchError("its config.json is not a JSON object.")


def _auto(planner: CapacityPlanner) -> int | None:
    try:
        return planner.auto()
    except MoEPrefetchError:
        return None
