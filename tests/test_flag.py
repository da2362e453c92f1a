# SPDX-License-Identifier: Apache-2.0
"""The flag says clearly what it does not accept, and nothing starts."""

import subprocess
import sys

import pytest

from vllm.model_executor.layers.fused_moe.expert_slots.config import (
    MoEPrefetchConfig,
    MoEPrefetchError,
)


def serve(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=180)


@pytest.mark.parametrize("slots", [0, -3, 2.5, "many", True, "auto"])
def test_bad_slot_counts_are_refused_by_value(slots):
    with pytest.raises(MoEPrefetchError, match=str(slots)):
        MoEPrefetchConfig.from_additional_config({"moe_gpu_prefetch": slots})


@pytest.mark.parametrize("options", [{"policy": "fifo"}, {"polcy": "lru"}, {"slots": 3}, [1]])
def test_bad_options_are_refused(options):
    with pytest.raises(MoEPrefetchError, match="moe-gpu-prefetch-config"):
        MoEPrefetchConfig.validated(8, options)


def test_options_without_the_flag_are_no_silent_no_op():
    with pytest.raises(MoEPrefetchError, match="without"):
        MoEPrefetchConfig.from_additional_config({"moe_gpu_prefetch_config": {"policy": "lfu"}})


@pytest.mark.parametrize("slots", ["0", "-3", "2.5", "many", "auto"])
def test_the_command_line_refuses_without_a_traceback(checkpoint, slots):
    result = serve(str(checkpoint), f"--moe-gpu-prefetch={slots}")
    assert result.returncode == 2
    assert slots in result.stderr
    assert "Traceback" not in result.stderr


def test_conflicting_flags_are_refused_before_anything_starts(checkpoint):
    result = serve(str(checkpoint), "--moe-gpu-prefetch", "8", "--enable-eplb")
    assert result.returncode == 2
    assert "--moe-gpu-prefetch cannot be combined with --enable-eplb" in result.stderr
    assert "Traceback" not in result.stderr
