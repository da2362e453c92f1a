# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A thread of a worker that writes a file beside the engine."""

import threading
from collections.abc import Callable

_PATIENCE_S = 10.0
"""Seconds that the worker's end waits for a write that has begun. The disk or the GPU
may hang."""


class BackgroundThread(threading.Thread):
    """Runs `target`, which pauses by `pause`, until it is told to end. It does not keep
    the process alive."""

    def __init__(self, name: str, target: Callable[[], None]):
        super().__init__(name=name, target=target, daemon=True)
        self._ending = threading.Event()

    def pause(self, seconds: float) -> bool:
        """Waits in the thread. Returns whether it goes on."""
        return not self._ending.wait(seconds)

    def end(self) -> bool:
        """Tells the thread to end, and waits for it. Returns whether the caller may
        write now, which it may not while a write hangs. A second call changes
        nothing."""
        self._ending.set()
        # The thread itself gets here if it garbage-collects a dropped engine.
        if self is not threading.current_thread():
            self.join(_PATIENCE_S)
            return not self.is_alive()
        return True
