# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What `vllm-moe-prefetch plan` refuses is one line that begins with the command's name
and the model's."""

import pytest

from tests.support.command_line import moe_prefetch_here


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (
            ["--enable-lora"],
            "--moe-gpu-prefetch cannot be combined with --enable-lora: adapters are",
        ),
        (
            ["--additional-config", '{"moe_gpu_prefetch": 9}', "--moe-gpu-prefetch=8"],
            "--moe-gpu-prefetch 8 contradicts additional_config moe_gpu_prefetch=9",
        ),
        (
            ["--additional-config", "[1]"],
            "--additional-config '[1]' is not a JSON object",
        ),
        (
            ["--moe-gpu-prefetch", "8", "--slots", "4,auto"],
            "--slots 4,auto and --moe-gpu-prefetch 8 both name numbers of slots. Give",
        ),
        (
            ["--additional-config", '{"moe_gpu_prefetch": 9}', "--slots", "8"],
            "--slots 8 and --moe-gpu-prefetch 9 both name numbers of slots. Give one",
        ),
        (
            ["--additional-config", '{"decode_backend": "latency_specialized"}'],
            "--moe-gpu-prefetch cannot be combined with decode_backend",
        ),
    ],
)
def test_a_conflict_names_the_model(checkpoint, monkeypatch, capsys, arguments, reason):
    """Status 2, nothing on standard output."""
    model = str(checkpoint)
    assert moe_prefetch_here(monkeypatch, "plan", model, *arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"vllm-moe-prefetch: error: {model}: {reason}")
    assert printed.err.count("\n") == 1 and printed.out == ""


@pytest.mark.parametrize(
    "asked", [[], ["--additional-config", '{"moe_gpu_prefetch": 9}']]
)
def test_the_request_is_a_row_of_the_table(checkpoint, monkeypatch, capsys, asked):
    """By whatever way it is given; without one the table has a range and `auto`."""
    moe_prefetch_here(monkeypatch, "plan", str(checkpoint), "--json", *asked)
    out = capsys.readouterr().out
    assert ('"slots": 9' in out) == bool(asked) and ("auto" in out) != bool(asked)
