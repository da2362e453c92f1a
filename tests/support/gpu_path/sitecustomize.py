# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""In every process that finds this directory on its path, vLLM keeps triton although no
driver is active. The repository must be on the path too."""

from tests.support.interpreter import keep_triton

keep_triton()
