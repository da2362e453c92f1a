# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Triton's interpreter, with TRITON_INTERPRET=1 in the environment."""

from types import SimpleNamespace


def keep_triton() -> None:
    """Makes vLLM keep triton although no driver is active: the interpreter needs none.

    Call it before vLLM is imported.
    """
    from triton.backends import backends

    driver = type("InterpreterDriver", (), {"is_active": staticmethod(lambda: True)})
    backends["cpu"] = SimpleNamespace(driver=driver)  # type: ignore[index]
