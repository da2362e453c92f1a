# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""In every process that finds this directory on its path, vLLM keeps triton although no
driver is active: the interpreter needs none."""

from types import SimpleNamespace

from triton.backends import backends

driver = type("InterpreterDriver", (), {"is_active": staticmethod(lambda: True)})
backends["cpu"] = SimpleNamespace(driver=driver)
