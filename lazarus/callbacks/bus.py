"""``CallbackBus``: delivers the record's events to callbacks, in a thread of the driver."""

from __future__ import annotations

import queue
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from lazarus.basics.threads import say_so, spawn

_CLOSE_S = 30.0  # longest wait for slow callbacks in ``close``
_BOUND = 4096  # events that may wait for slow callbacks; further events are dropped and counted


class CallbackBus:
    """Calls callbacks in a thread, from a bounded queue of events.

    A callback that raises is disabled with a message on stderr.

    Args:
        callbacks: Objects with ``on_event(event)``.
        fail: Also end the run when a callback raises, through ``on_failure``.

    Attributes:
        dropped: Number of events that were dropped because the queue was full.
        error: The first error that was passed to ``on_failure``, or None.
        on_failure: Called with the error that ends the run; set by the owner.
    """

    def __init__(self, callbacks: Sequence[Any], *, fail: bool) -> None:
        self._active = list(callbacks)
        self._fail = fail
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(_BOUND)
        self.dropped = 0
        self.error: BaseException | None = None
        self.on_failure: Callable[[BaseException], None] = lambda problem: None
        self._thread = spawn("callbacks", self._run, on_death=self._died)

    def publish(self, event: dict[str, Any]) -> None:
        try:
            self._queue.put_nowait(event)
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Wait, at most about a minute, until queued events are delivered; stop the thread."""
        with suppress(queue.Full):
            self._queue.put(None, timeout=_CLOSE_S if self._thread.is_alive() else 0.0)
            self._thread.join(_CLOSE_S)

    def _died(self, name: str, problem: BaseException) -> None:
        """The thread itself failed: no callback would receive further events."""
        say_so(name, problem)
        if self.error is None:
            self.error = problem
            self.on_failure(problem)

    def _run(self) -> None:
        while (event := self._queue.get()) is not None:
            for callback in tuple(self._active):
                self._call(callback, event)

    def _call(self, callback: Any, event: dict[str, Any]) -> None:
        handler = getattr(callback, "on_event", None)
        if handler is None:
            return
        try:
            handler(event)
        except BaseException as problem:  # noqa: BLE001 - the user's: one warning, then without
            self._active.remove(callback)
            print(f"callback {type(callback).__name__} raised and is off:", file=sys.stderr)
            traceback.print_exc()
            if self._fail and self.error is None:
                self.error = problem
                self.on_failure(problem)
