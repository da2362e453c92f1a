# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
import faulthandler
import os
from collections.abc import Callable

import pytest


@pytest.fixture
def signal_of() -> Callable[[Callable[[], object]], int]:
    """Does something in a copy of this process, and says which signal ended it."""

    def signal_of(action: Callable[[], object]) -> int:
        process = os.fork()
        if process == 0:
            faulthandler.disable()
            try:
                action()
            finally:
                os._exit(0)
        return os.WTERMSIG(os.waitpid(process, 0)[1])

    return signal_of
