# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The kernels in Triton's interpreter. `make test` runs this directory in a process of
its own, with TRITON_INTERPRET=1: it must be set before triton is imported, and vLLM's
engine, which the other tests run, must not see an interpreted triton."""

import os

from tests.support.interpreter import keep_triton
from tests.support.left_out import left_out

if os.environ.get("TRITON_INTERPRET") == "1":
    keep_triton()
else:

    def pytest_pycollect_makemodule(module_path, parent):
        reason = "runs apart: TRITON_INTERPRET=1 pytest tests/cuda (make test-kernels)"
        return left_out(parent, module_path, reason)
