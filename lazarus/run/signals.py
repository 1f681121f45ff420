"""Ctrl-C and SIGTERM while a run goes on: counted by handlers that do nothing else."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Self


class Signals:
    """How often SIGINT and SIGTERM came since this context was entered.

    A handler runs between any two instructions of the main thread, also while that thread deals
    with the signal before. A handler that raised, or took a lock, could leave the run without
    anybody who waits for its end; these handlers only count.

    Outside the main thread no handler can be set, and nothing is counted. A handler of SIGINT that
    is not Python's own stays as it is.
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
            if handler is not None:  # None: set by code that is not Python's
                signal.signal(number, handler)

    def _interrupted(self, _number: int, _frame: FrameType | None) -> None:
        self.interrupts += 1

    def _terminated(self, _number: int, _frame: FrameType | None) -> None:
        self.terminations += 1
