"""Threads whose death is news: whoever starts one says who must hear of an error in it."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

OnDeath = Callable[[str, BaseException], None]  # the thread's name, what ended it


def spawn(name: str, work: Callable[..., None], *args: Any, on_death: OnDeath) -> threading.Thread:
    """Start a daemon thread.

    Args:
        work: What it does, with ``args``; it may end by returning at any time.
        on_death: Called in that thread, once, if ``work`` raises.
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
    """For a thread that others can do without: one traceback on standard error."""
    text = "".join(traceback.format_exception(problem))
    print(f"thread {name} of this process has died:\n{text}", file=sys.stderr, flush=True)
