# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Fixtures of all tests, and the vLLM that they import: the installed one, or the
release in `TEST_VLLM`. No test downloads a model."""

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tools import vllm_versions

if TYPE_CHECKING:
    from vllm.engine.arg_utils import EngineArgs

    from tests.support.fresh_process import Fresh

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

ASKED_VLLM = os.environ.get("TEST_VLLM") or vllm_versions.installed()
vllm_versions.use(ASKED_VLLM.partition("+")[0])


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support.sample import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("model") / "qwen3-moe")


@pytest.fixture(scope="session")
def fresh() -> Iterator["Fresh"]:
    from tests.support.fresh_process import Fresh

    process = Fresh()
    yield process
    process.close()


@pytest.fixture
def caplog_vllm(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """`caplog` for vLLM's loggers, which do not propagate to the root logger.

    vLLM configures them when the first engine of a process starts, and drops every
    handler that was added before. So it is made to do that here.
    """
    from vllm.config.logging import LoggingConfig
    from vllm.logger import configure_logging_if_needed

    configure_logging_if_needed(LoggingConfig())
    logger = logging.getLogger("vllm")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture
def parse(checkpoint: Path) -> "Callable[..., EngineArgs]":
    """What the command makes of its arguments, in this process."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm.plugins.moe_gpu_prefetch import register

    register()
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())

    def parse(*arguments: str) -> "EngineArgs":
        parsed = parser.parse_args(["--model", str(checkpoint), *arguments])
        return AsyncEngineArgs.from_cli_args(parsed)

    return parse
