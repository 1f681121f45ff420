"""Count Ctrl-C and SIGTERM during a run."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Self


class Signals:
    """A context that counts SIGINT (``interrupts``) and SIGTERM (``terminations``).

    A signal handler runs between any two instructions of the main thread, also while that thread
    handles an earlier signal. If a handler raised or took a lock, the main thread might never wait
    for the run's end; so these handlers only count.

    Outside the main thread, handlers cannot be set and nothing is counted. A SIGINT handler other
    than Python's default is not replaced.
    """

    def __init__(self) -> None:
        self.interrupts = 0
        self.terminations = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupted)
            self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._terminated)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            if handler is not None:  # None: the handler was not set from Python
                signal.signal(number, handler)

    def _interrupted(self, _number: int, _frame: FrameType | None) -> None:
        self.interrupts += 1

    def _terminated(self, _number: int, _frame: FrameType | None) -> None:
        self.terminations += 1
