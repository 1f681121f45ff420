"""What the user's code raises in a worker, told apart from what the library raises itself."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from dispatcher.errors import RanksPartedError
from lazarus.basics.tracebacks import chain, describe, is_of_user, place_of
from lazarus.control.messages import UserError
from lazarus.errors import (
    CollectiveError,
    ConfigError,
    DataError,
    FencedError,
    LazarusError,
    UserMistakeError,
)
from lazarus.failure import Cause
from lazarus.runtime.fence.ledger import StepLedger
from lazarus.runtime.fence.observer import InjectedCrashError
from lazarus.runtime.fence.whereabouts import Note, Whereabouts
from lazarus.runtime.spec import UserCode

# Raised by the library about the user's code.
_OF_USER = (ConfigError, DataError, InjectedCrashError, RanksPartedError, UserMistakeError)
# Functions of the user's that a phase calls, the one most likely to be at fault first.
_FUNCTIONS = {
    "build": ("model", "data", "optimizer"),
    "data": ("data", "collate"),
    "forward": ("loss", "model"),
    "backward": ("loss", "model"),
    "on_gradients": ("hooks",),
    "schedule": ("schedule",),
    "optimizer": ("optimizer",),
    "on_commit": ("hooks",),
    "evaluate": ("eval_data", "loss", "model"),
}


DATA_THREAD = "data"  # name of the thread that reads ahead, see ``Reading``


class LeftProcessError(BaseException):
    """The user's function called ``os._exit``: it would have ended the process without a word."""


class UserCodeFailure(Exception):
    """Wraps the ``problem`` that ended a call of the user's functions; ``note`` says where."""

    def __init__(self, problem: BaseException, note: Note) -> None:
        super().__init__(note.phase)
        self.problem, self.note = problem, note


@contextmanager
def user_code(ledger: StepLedger, where: Whereabouts) -> Iterator[None]:
    """Exceptions in here are the user's, unless the library's own or the attempt was over anyway.

    Raises:
        UserCodeFailure: The user's code raised, ``SystemExit`` and ``KeyboardInterrupt`` included.
        FencedError, CollectiveError: The attempt is over; user code may have wrapped the news.
    """
    try:
        yield
    except BaseException as problem:
        for cause in chain(problem):
            if isinstance(cause, FencedError | CollectiveError):
                if cause is problem:
                    raise
                raise cause from None
        if not isinstance(problem, InjectedCrashError) and ledger.fence != ledger.gen:
            raise FencedError(generation=ledger.gen, fence=ledger.fence) from problem
        if is_users(problem, where.now):
            raise UserCodeFailure(problem, where.now) from problem
        raise
    finally:
        where.leave()


@contextmanager
def fatal(where: Whereabouts, phase: str) -> Iterator[None]:
    """Whatever is raised in here ends the process: nothing can be done again (rule 13).

    Raises:
        UserCodeFailure: It is the user's code that has to change.
    """
    where.enter(phase)
    try:
        yield
    except BaseException as problem:
        if is_users(problem, where.now):
            raise UserCodeFailure(problem, where.now) from problem
        raise
    finally:
        where.leave()


def is_users(problem: BaseException, note: Note) -> bool:
    """Whether it is the user's code that has to change."""
    if isinstance(problem, LazarusError | RanksPartedError):
        return isinstance(problem, _OF_USER)
    return note.phase == "build" or is_of_user(problem) or bool(note.phase and note.place)


def message_of(problem: BaseException, note: Note, *, generation: int, cause: Cause) -> UserError:
    """What the controller is told: bounded, and fit for any encoding."""
    said = describe(problem)
    place = said.place or note.place
    summary = said.summary
    if isinstance(problem, UserMistakeError):  # a sentence of its own
        summary = summary.removeprefix(f"{type(problem).__name__}: ")
    shown = said.shown or (f"In your code:\n  {place}" if place else said.full)
    return UserError(
        generation=generation,
        step=note.step,
        error=summary,
        traceback=said.full,
        cause=cause,
        rank=note.rank,
        phase=note.phase,
        sample_ids=note.sample_ids,
        place=place,
        shown=shown,
        on_purpose=isinstance(problem, InjectedCrashError),
    )


def places_of(user: UserCode) -> dict[str, str]:
    """Phase -> where the function of the user's that it calls is defined; empty for built-ins."""
    return {phase: _first_place(user, names) for phase, names in _FUNCTIONS.items()}


def _first_place(user: UserCode, names: tuple[str, ...]) -> str:
    for name in names:
        value: Any = getattr(user, name)
        for function in value if name == "hooks" else (value,):
            if function is not None and (place := place_of(function)):
                return place
    return ""


def catch_exit(where: Whereabouts, *, real: Callable[[int], NoReturn] = os._exit) -> None:
    """Make ``os._exit`` in a function of the user's an exception; elsewhere it does what it does.

    A child that the user's code forks leaves as it likes.
    """
    own = os.getpid()

    def leave(status: int) -> NoReturn:
        reads = threading.current_thread().name.startswith(DATA_THREAD)
        if (where.now.phase or reads) and os.getpid() == own:
            raise LeftProcessError(f"os._exit({status})")
        real(status)

    os._exit = leave
