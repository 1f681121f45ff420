"""Retry storage operations for a bounded time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from lazarus.checkpoint.errors import StorageError

_Found = TypeVar("_Found")
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0
_LOOK_S = 0.2  # how often ``waiting`` is called while an operation or a pause lasts


def patiently(
    work: Callable[[], _Found],
    *,
    for_s: float,
    stuck_s: float,
    waiting: Callable[[], None] = lambda: None,
    moved: Callable[[], int] = lambda: 0,
    place: str,
    operation: str,
) -> _Found:
    """Return the result of ``work``, which is retried with growing pauses after a StorageError.

    Each attempt runs in a thread of its own, so an attempt that hangs can be abandoned.

    Args:
        work: The storage operation.
        for_s: No retry begins later than this many seconds after the start.
        stuck_s: An attempt without progress for this many seconds is abandoned.
        waiting: Called every 0.2 s; an exception that it raises ends the wait.
        moved: Returns a number that grows while ``work`` makes progress.
        place, operation: Named in the error if storage does not answer.

    Raises:
        StorageError: The last attempt failed or did not answer.
    """
    started, pause_s = time.monotonic(), _FIRST_PAUSE_S
    while True:
        try:
            return _watched(work, stuck_s, waiting, moved, place=place, operation=operation)
        except StorageError:
            if time.monotonic() - started + pause_s > for_s:
                raise
        _pause(pause_s, waiting)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def _watched(
    work: Callable[[], _Found],
    stuck_s: float,
    waiting: Callable[[], None],
    moved: Callable[[], int],
    *,
    place: str,
    operation: str,
) -> _Found:
    outcome: list[_Found] = []
    problem: list[BaseException] = []
    done = threading.Event()

    def body() -> None:
        try:
            outcome.append(work())
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            problem.append(error)
        finally:
            done.set()

    threading.Thread(target=body, name="storage", daemon=True).start()
    seen, since = moved(), time.monotonic()
    while not done.wait(_LOOK_S):
        waiting()
        if moved() != seen:
            seen, since = moved(), time.monotonic()
        if time.monotonic() - since > stuck_s:
            raise StorageError(
                url=place, operation=operation, reason=f"no answer within {stuck_s:.0f} s"
            )
    if problem:
        raise problem[0]
    return outcome[0]


def _pause(seconds: float, waiting: Callable[[], None]) -> None:
    until, still = time.monotonic() + seconds, threading.Event()
    while (left := until - time.monotonic()) > 0:
        waiting()
        still.wait(min(left, _LOOK_S))
