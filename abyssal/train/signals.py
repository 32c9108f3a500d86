"""Ctrl-C and SIGTERM as a wish to stop, heard between two steps."""

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

# One wish may arrive several times at once: `timeout` and batch systems signal a process, and then its group.
SAME = 1.0  # seconds


class StopSignals:
    """While this lasts, the first SIGINT or SIGTERM is noted in `received`; another one, not at once, ends the process.

    Off the main thread, where Python allows no handlers, nothing is caught.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._at = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._at = signal.Signals(number), now
        elif now - self._at > SAME:
            self._restore()
            os.kill(os.getpid(), number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
