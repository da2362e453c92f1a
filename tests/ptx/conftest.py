# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The compiled kernels, simulated. In a process of its own, as `tests/cuda`: vLLM's
engine, which other tests run, must not find a Triton that has no driver."""

import sys

if "vllm.triton_utils" in sys.modules:
    collect_ignore_glob = ["test_*.py"]
else:
    from tools import compile_kernels  # noqa: F401  # imports the kernels though no driver is active
