# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The flag on a vLLM that expert slots cannot run on: it is refused with the reason.
Nothing else is touched. This module uses only what every version of vLLM has."""

import argparse
import functools
import logging
from collections.abc import Callable
from typing import Any

# As in `expert_slots/config.py`, which imports vLLM and so cannot be imported here.
_FLAGS = ("moe_gpu_prefetch", "moe_gpu_prefetch_config")

logger = logging.getLogger("vllm.plugins.moe_gpu_prefetch")


def install(reason: str) -> None:
    """Refuses the flag, and slots that a script asks for in `additional_config`.
    Without either, vLLM runs as stock."""
    try:
        from vllm.engine.arg_utils import EngineArgs

        add_cli_args = EngineArgs.add_cli_args
        create_engine_config = EngineArgs.create_engine_config
    except Exception as error:
        logger.warning("--moe-gpu-prefetch is not available: %s (%s)", reason, error)
        return

    def refused(value: str) -> Any:
        raise argparse.ArgumentTypeError(reason)

    @functools.wraps(add_cli_args)
    def add_cli_args_and_refuse(*args: Any, **kwargs: Any) -> Any:
        parser = add_cli_args(*args, **kwargs)
        return with_flags(parser, lambda: _add(parser, refused))

    @functools.wraps(create_engine_config)
    def create_engine_config_or_refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked = getattr(self, "additional_config", None)
        if isinstance(asked, dict) and any(
            asked.get(name) is not None for name in _FLAGS
        ):
            raise ValueError(reason)
        return create_engine_config(self, *args, **kwargs)

    EngineArgs.add_cli_args = staticmethod(add_cli_args_and_refuse)
    EngineArgs.create_engine_config = create_engine_config_or_refuse


def with_flags(parser: Any, add: Callable[[], None]) -> Any:
    """Returns the parser after `add`. Where `add` fails, a log line says that the flags
    are missing."""
    try:
        add()
    except Exception as error:
        logger.warning(
            "--moe-gpu-prefetch is not available: vLLM's parser rejected it (%s)", error
        )
    return parser


def _add(parser: Any, refused: Callable[[str], Any]) -> None:
    for name in _FLAGS:
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=refused,
            help="Not available on this version of vLLM.",
        )
