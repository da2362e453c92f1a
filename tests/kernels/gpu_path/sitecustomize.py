# SPDX-License-Identifier: Apache-2.0
"""In every process that finds this directory on its path: vLLM keeps triton, whose interpreter needs
no driver, although no driver is active."""

from types import SimpleNamespace

from triton.backends import backends

driver = type("InterpreterDriver", (), {"is_active": staticmethod(lambda: True)})
backends["cpu"] = SimpleNamespace(driver=driver)
