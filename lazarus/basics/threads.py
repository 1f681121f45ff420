"""Start threads whose errors are reported to a callback."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

OnDeath = Callable[[str, BaseException], None]  # the thread's name, the exception that ended it


def spawn(name: str, work: Callable[..., None], *args: Any, on_death: OnDeath) -> threading.Thread:
    """Start a daemon thread.

    Args:
        name: Name of the thread.
        work: Called in the thread with ``args``; may return at any time.
        on_death: Called in the thread, once, if ``work`` raises.
    """
    thread = threading.Thread(
        target=_guarded, args=(name, work, args, on_death), name=name, daemon=True
    )
    thread.start()
    return thread


def _guarded(
    name: str, work: Callable[..., None], args: tuple[Any, ...], on_death: OnDeath
) -> None:
    try:
        work(*args)
    except BaseException as problem:  # noqa: BLE001 - the edge of a thread; handed on
        on_death(name, problem)


def say_so(name: str, problem: BaseException) -> None:
    """Print the traceback of a dead thread to stderr; an ``on_death`` for dispensable threads."""
    text = "".join(traceback.format_exception(problem))
    print(f"thread {name} of this process has died:\n{text}", file=sys.stderr, flush=True)
