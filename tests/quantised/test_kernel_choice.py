# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Which of vLLM's kernels a format gets on a GPU with expert slots, whatever else vLLM
has for it there, and what is said where the user names a kernel that slots cannot
serve."""

import json
import os
import subprocess
import sys

import pytest

from tests.support.kernel_choice import BACKENDS, CAPABILITIES

MARLIN, TRITON = "MarlinExperts", "TritonExperts"
NEW = [f"{major}.{minor}" for major, minor in CAPABILITIES if (major, minor) >= (8, 9)]
OLD = [f"{major}.{minor}" for major, minor in CAPABILITIES if (major, minor) < (8, 9)]
FP8 = {"fp8-block", "fp8-channel", "fp8-static"}

NAMED = {
    **{name: {"triton": TRITON, "marlin": MARLIN} for name in FP8},
    "int8": {"triton": TRITON},
    "int4": {"triton": "TritonWNA16Experts", "marlin": MARLIN},
    "mxfp4": {"marlin": MARLIN},
    "nvfp4": {"marlin": MARLIN},
}
"""What --moe-backend triton and marlin get; the others vLLM refuses itself."""


@pytest.fixture(scope="module")
def found():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, "-m", "tests.support.kernel_choice"],
        env=environment | {"VLLM_CONFIGURE_LOGGING": "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.mark.parametrize("name", sorted(FP8))
def test_fp8_is_tritons_where_the_gpu_has_it(found, name):
    assert found["chosen"][name] == {
        **dict.fromkeys(OLD, MARLIN),
        **dict.fromkeys(NEW, TRITON),
    }


@pytest.mark.parametrize(
    ("name", "kernel"),
    [("int8", TRITON), ("int4", MARLIN), ("mxfp4", MARLIN), ("nvfp4", MARLIN)],
)
def test_the_others_have_one_kernel_on_all_gpus(found, name, kernel):
    assert found["chosen"][name] == dict.fromkeys(OLD + NEW, kernel)


@pytest.mark.parametrize("name", NAMED)
def test_a_kernel_that_slots_serve_can_be_named(found, name):
    for backend in ("triton", "marlin"):
        answer = found["explicit"][name][backend]
        assert answer == NAMED[name].get(backend) or (
            backend not in NAMED[name] and answer.startswith("ValueError: ")
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_other_is_refused_in_one_line(found, backend):
    """With its class and the way out where vLLM has it, and else in vLLM's words."""
    refused = 0
    for answers in found["explicit"].values():
        classes, there, missing = answers[backend]
        assert "\n" not in there + missing
        assert missing.startswith(("ValueError: ", "MoEPrefetchError: "))
        if classes:
            assert there.startswith("MoEPrefetchError: --moe-gpu-prefetch cannot serve")
            assert f"Drop --moe-backend {backend}, or serve without" in there
            assert any(name in there for name in classes) and len(there) < 700
            refused += 1
    assert refused >= 2
