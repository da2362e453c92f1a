# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Runs a command up to the point where its own parser has read the arguments. In a
process of its own (`tests.support.fresh_process`): commands change what they run in."""

import argparse
import contextlib
import io
import json
import runpy
import sys
from collections.abc import Callable
from itertools import takewhile
from typing import Any
from unittest.mock import patch


class _Read(BaseException):
    """Not an `Exception`: those a command may answer with a message of its own."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments


def objections(commands: list[tuple[list[str], bool]], model: str) -> str:
    """What the parsers object to, as JSON: a text for each command, empty if nothing.

    Args:
        commands: words, the first a command, a module or a file of Python; and whether
            the command is only mentioned: then the help of its subcommand has to name
            its options.
        model: a checkpoint, for what is read of a model.
    """
    return json.dumps([_objection(*command, model) for command in commands])


def _objection(words: list[str], mentioned: bool, model: str) -> str:
    objection, _ = _run(words, model)
    if not objection or not mentioned:
        return objection
    subcommand = takewhile(lambda word: not word.startswith("-"), words)
    failed, printed = _run([*subcommand, "--help"], model)
    options = (word for word in words if word.startswith("--"))
    return failed or ", ".join(o for o in options if o not in printed)


def _run(words: list[str], model: str) -> tuple[str, str]:
    """What the command objects to, and what it prints."""
    parse_args = argparse.ArgumentParser.parse_args

    def read(*args: Any, **kwargs: Any) -> Any:
        raise _Read(parse_args(*args, **kwargs))

    with (
        contextlib.redirect_stderr(io.StringIO()) as errors,
        contextlib.redirect_stdout(io.StringIO()) as output,
        patch.object(argparse.ArgumentParser, "parse_args", read),
        patch.object(sys, "argv", words),
    ):
        try:
            _main(words)()
        except _Read as found:
            if words[:2] != ["vllm", "serve"]:
                return "", ""
            return _refusal(found.arguments, model), ""
        except SystemExit as stop:
            if stop.code:
                return errors.getvalue() or str(stop.code), ""
            return "", output.getvalue()
        except Exception as error:
            return repr(error), ""
    return "it read no arguments", ""


def _refusal(arguments: argparse.Namespace, model: str) -> str:
    """What slots cannot be combined with is refused after parsing."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    arguments.model = model
    try:
        with contextlib.redirect_stderr(io.StringIO()) as errors:
            AsyncEngineArgs.from_cli_args(arguments)
    except SystemExit:
        return errors.getvalue()
    return ""


def _main(words: list[str]) -> Callable[[], Any]:
    if words[0] == "vllm":
        from vllm.entrypoints.cli.main import main

        return main
    if words[0] == "vllm-moe-prefetch":
        from vllm.plugins.moe_gpu_prefetch.command.main import main as plan

        return plan
    if words[0].endswith(".py"):
        return lambda: runpy.run_path(words[0], run_name="__main__")
    return lambda: runpy.run_module(words[0], run_name="__main__")
