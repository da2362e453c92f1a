# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The compiled kernels, simulated. In a process of its own, as `tests/cuda`: vLLM's
engine, which other tests run, must not find a Triton that has no driver."""

import sys

from tests.support.left_out import left_out

if "vllm.triton_utils" in sys.modules:

    def pytest_pycollect_makemodule(module_path, parent):
        reason = "runs apart: pytest tests/ptx (make test-kernels)"
        return left_out(parent, module_path, reason)

else:
    from tools import compile_kernels  # noqa: F401  # imports the kernels though no driver is active
