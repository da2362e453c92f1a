# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Runs snippets, each in a process of its own that has imported vLLM and loaded no
plugin yet. They are forked from one that waits here, which saves the seconds of
importing vLLM for each."""

import json
import os
import subprocess
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vllm
from tests.support import ROOT

INSTALLED = vllm.__version__
OTHER_PLUGIN = str(Path(__file__).with_name("other_plugin"))


@dataclass
class Ended:
    status: int
    output: str


class Fresh:
    """`fresh(code)` runs the code with `load_general_plugins`, `seams` and the
    functions below at hand. `acme` says what the other plugin does, and `order` whether
    it is loaded before ours."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.fresh_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "VLLM_LOGGING_COLOR": "0"},
            cwd=ROOT,
        )

    def __call__(
        self, code: str, acme: str = "", order: str = "before", **env: str
    ) -> Ended:
        assert self._process.stdin and self._process.stdout
        request = {"code": code, "order": acme and order, "env": {"ACME": acme, **env}}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Ended(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(timeout=30)


def parse(model: str, *arguments: str) -> Any:
    """What `vllm serve` makes of its arguments."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    return AsyncEngineArgs.from_cli_args(
        parser.parse_args(["--model", model, *arguments])
    )


def ask(model: str, **arguments: Any) -> Any:
    """What `LLM(...)` makes of its arguments, 8 slots asked for."""
    from vllm.engine.arg_utils import EngineArgs

    asked = {"moe_gpu_prefetch": 8}
    return EngineArgs(
        model, additional_config=asked, **arguments
    ).create_engine_config()


def touched(act: Any) -> list[str]:
    """The seams of which `act` replaced something, and the layer classes it
    registered."""
    from vllm.model_executor.custom_op import op_registry_oot
    from vllm.platforms import current_platform

    from vllm.plugins.moe_gpu_prefetch.stock import seams

    table = [seam for seam in seams.SEAMS if seam.applies_to(INSTALLED)]
    here = [
        seam.target for seam in table if not seam.on_cuda or current_platform.is_cuda()
    ]
    before = {target: seams.resolve(target) for target in here}
    act()
    changed = [
        target for target, value in before.items() if seams.resolve(target) != value
    ]
    return sorted(changed) + sorted(op_registry_oot)


def _serve() -> None:
    from vllm.engine import arg_utils  # noqa: F401
    from vllm.model_executor.layers.fused_moe.runner import moe_runner  # noqa: F401
    from vllm.model_executor.model_loader import base_loader  # noqa: F401

    from vllm.plugins import load_general_plugins

    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryFile() as output:
            pid = os.fork()
            if pid == 0:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                os.environ.update(request["env"])
                if request["order"]:
                    sys.path.insert(
                        0 if request["order"] == "before" else len(sys.path),
                        OTHER_PLUGIN,
                    )
                names = {
                    f.__name__: f for f in (parse, ask, touched, load_general_plugins)
                }
                os._exit(_run(request["code"], {"vllm": vllm, **names}))
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            output.seek(0)
            ended = {"status": status, "output": output.read().decode()}
        print(json.dumps(ended), flush=True)
    os._exit(0)


def _run(code: str, names: dict[str, Any]) -> int:
    status = 0
    try:
        exec(code, names)
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


if __name__ == "__main__":
    _serve()
