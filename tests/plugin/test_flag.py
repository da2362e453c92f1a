# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The flag says clearly what it does not accept, and nothing starts."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests.support.engine import OPTIONS
from vllm.model_executor.layers.fused_moe.expert_slots.config import (
    MoEPrefetchConfig,
    MoEPrefetchError,
)


def command(*arguments: str, before: str = "", **environment: str):
    """Runs the real `vllm` command, after the statement `before`."""
    code = f"{before}\nfrom vllm.entrypoints.cli.main import main\nmain()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize("slots", [0, -3, 2.5, "many", True])
def test_bad_slot_counts_are_refused_by_value(slots):
    """In a script the count comes through additional_config, unparsed."""
    with pytest.raises(MoEPrefetchError, match=str(slots)):
        MoEPrefetchConfig.of(
            SimpleNamespace(additional_config={"moe_gpu_prefetch": slots})
        )


@pytest.mark.parametrize(
    "options", [{"policy": "fifo"}, {"polcy": "lru"}, {"slots": 3}, [1]]
)
def test_bad_options_are_refused(options):
    """An unknown key or value is not ignored."""
    with pytest.raises(MoEPrefetchError, match="moe-gpu-prefetch-config"):
        MoEPrefetchConfig.validated(8, options)


@pytest.mark.parametrize("slots", ["0", "-3", "2.5", "many"])
def test_the_command_line_refuses_bad_slot_counts(parse, capsys, slots):
    """argparse's own error, with the value."""
    with pytest.raises(SystemExit) as stop:
        parse(f"--moe-gpu-prefetch={slots}")
    assert stop.value.code == 2
    assert slots in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--cpu-offload-gb", "1", "--cpu-offload-params", "routed_experts"],
            "--cpu-offload-gb on the experts",
        ),
        (
            ["--additional-config", '{"moe_gpu_prefetch": 9}'],
            "contradicts additional_config moe_gpu_prefetch=9",
        ),
    ],
)
def test_what_cannot_be_combined_is_refused(parse, capsys, arguments, message):
    """Each combination by name, as a command-line error."""
    with pytest.raises(SystemExit) as stop:
        parse("--moe-gpu-prefetch", "8", *arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("vllm: error: ") and message in error


def test_offload_of_other_weights_is_not_refused(parse):
    """Stock's offload may take the attention, say; the experts are ours."""
    arguments = ["--cpu-offload-gb", "1", "--cpu-offload-params", "self_attn"]
    assert parse("--moe-gpu-prefetch", "8", *arguments).cpu_offload_gb == 1


def test_options_without_the_flag_are_refused(parse, capsys):
    """No silent no-op."""
    with pytest.raises(SystemExit):
        parse("--moe-gpu-prefetch-config.policy", "lfu")
    assert (
        "without moe_gpu_prefetch. Add --moe-gpu-prefetch N" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["policy=lru", "lfu_half_life=9"], "9 has no effect with policy lru"),
        (["trace_limit=2MiB"], "2MiB has no effect without trace. Add trace FILE"),
    ],
)
def test_an_option_without_effect_is_refused(parse, capsys, arguments, message):
    options = [f"--moe-gpu-prefetch-config.{argument}" for argument in arguments]
    with pytest.raises(SystemExit):
        parse("--moe-gpu-prefetch", "8", *options)
    assert message in capsys.readouterr().err
    parse("--moe-gpu-prefetch", "8", *options[:-1])


def test_options_take_json_and_dotted_keys_and_reach_the_config(parse):
    """Both spellings end in the same additional_config, and so in the compile-cache
    key."""
    json = parse(
        "--moe-gpu-prefetch", "8", "--moe-gpu-prefetch-config", '{"policy": "lfu"}'
    )
    dotted = parse("--moe-gpu-prefetch", "8", "--moe-gpu-prefetch-config.policy", "lfu")
    assert json.additional_config == dotted.additional_config
    assert json.additional_config == {
        "moe_gpu_prefetch": 8,
        "moe_gpu_prefetch_config": {"policy": "lfu"},
    }
    hashes = []
    for slots in (8, 8, 9):
        arguments = parse("--moe-gpu-prefetch", str(slots))
        hashes.append(arguments.create_engine_config().compute_hash())
    assert hashes[0] == hashes[1] != hashes[2]


def test_without_the_flag_the_arguments_are_stocks(parse):
    """No key appears in additional_config, no worker extension."""
    arguments = parse()
    assert not arguments.additional_config and not arguments.worker_extension_cls


@pytest.mark.parametrize(
    ("before", "environment", "arguments", "message"),
    [
        (
            "",
            {},
            ["--moe-gpu-prefetch=many"],
            "'many': expected the number of expert slots",
        ),
        ("", {}, ["--moe-gpu-prefetch=8", "--enable-eplb"], "cannot be combined with"),
        (
            "import vllm; vllm.__version__ = '0.40.1'",
            {},
            ["--moe-gpu-prefetch=8"],
            "expert slots support vLLM <0.34,>=0.32, and 0.40.1 is installed",
        ),
        (
            "",
            {"VLLM_PLUGINS": "another"},
            ["--moe-gpu-prefetch=8"],
            "unrecognized arguments: --moe-gpu-prefetch=8",
        ),
    ],
    ids=["value", "conflict", "version", "plugin disabled"],
)
def test_the_real_command_ends_with_one_clear_message(
    checkpoint, before, environment, arguments, message
):
    """Exit status 2, the reason, no traceback, nothing started."""
    result = command("serve", str(checkpoint), *arguments, before=before, **environment)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert "EngineCore" not in result.stderr + result.stdout


def test_help_has_a_group_with_every_option():
    """The field docstrings are the help text."""
    result = command("serve", "--help=ExpertSlots")
    assert "--moe-gpu-prefetch N|SIZE|auto" in result.stdout
    assert "--moe-gpu-prefetch-config" in result.stdout
    for option in OPTIONS:
        assert f"{option}:" in result.stdout
