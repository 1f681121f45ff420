"""Tells exceptions of the user's code from those of the library itself, and reports both.

Rule 13 is that of docs/protocol.md.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from dispatcher.errors import RanksPartedError
from lazarus.basics.tracebacks import chain, describe, is_of_user, place_of
from lazarus.control.messages import Suspicion, UserError
from lazarus.errors import (
    BadSourceError,
    CollectiveError,
    ConfigError,
    DataError,
    FencedError,
    LazarusError,
    TransferError,
    UserMistakeError,
)
from lazarus.failure import Cause
from lazarus.runtime.comm.rank_groups import STORE
from lazarus.runtime.fence.ledger import StepLedger
from lazarus.runtime.fence.observer import InjectedCrashError
from lazarus.runtime.fence.whereabouts import Note, Whereabouts
from lazarus.runtime.spec import UserCode

# Errors that the library raises about the user's code.
_OF_USER = (ConfigError, DataError, InjectedCrashError, RanksPartedError, UserMistakeError)
# User functions that a phase calls, the most likely cause of an error first.
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
    """The user's function called ``os._exit``, which would have ended the process silently."""


class UserCodeFailure(Exception):
    """Wraps the exception ``problem`` that ended a user function; ``note`` says where."""

    def __init__(self, problem: BaseException, note: Note) -> None:
        super().__init__(note.phase)
        self.problem, self.note = problem, note


@contextmanager
def user_code(ledger: StepLedger, where: Whereabouts) -> Iterator[None]:
    """Context that tells errors of the user's code from other errors.

    Errors of the library pass unchanged unless they are about the user's code. Once the attempt is
    over (a fence, a failed collective), errors count as its consequence: user code may have caught
    and wrapped the cause.

    Raises:
        UserCodeFailure: The user's code raised; includes ``SystemExit`` and ``KeyboardInterrupt``.
        FencedError, CollectiveError: The attempt is over.
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
    """Context in which any exception ends the process, since the work cannot be repeated (rule 13).

    Raises:
        UserCodeFailure: The exception is the fault of the user's code.
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
    """Whether the user's code has to change to avoid this exception."""
    if isinstance(problem, LazarusError | RanksPartedError):
        return isinstance(problem, _OF_USER)
    return note.phase == "build" or is_of_user(problem) or bool(note.phase and note.place)


def message_of(problem: BaseException, note: Note, *, generation: int, cause: Cause) -> UserError:
    """Message about an exception for the controller, bounded in size and safe to encode."""
    said = describe(problem)
    place = said.place or note.place
    summary = said.summary
    if isinstance(problem, UserMistakeError):  # its text is a full sentence
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


def suspicion_of(
    problem: CollectiveError | TransferError, *, generation: int, step: int, phase: str
) -> Suspicion:
    """Message about a failed exchange, or about a copy of state that cannot be used."""
    bad = {}
    if isinstance(problem, BadSourceError):
        found = {"storage_url": problem.url, "operation": problem.operation}
        bad = {"bad_source": problem.name, **found}
    return Suspicion(
        generation=generation,
        step=step,
        phase=phase,
        error=str(problem),
        **bad,
        store=isinstance(problem, CollectiveError) and problem.label == STORE,
    )


def places_of(user: UserCode) -> dict[str, str]:
    """Where each phase's user function is defined, by phase; empty for built-in functions."""
    return {phase: _first_place(user, names) for phase, names in _FUNCTIONS.items()}


def _first_place(user: UserCode, names: tuple[str, ...]) -> str:
    for name in names:
        value: Any = getattr(user, name)
        for function in value if name == "hooks" else (value,):
            if function is not None and (place := place_of(function)):
                return place
    return ""


def catch_exit(where: Whereabouts, *, real: Callable[[int], NoReturn] = os._exit) -> None:
    """Make ``os._exit`` raise ``LeftProcessError`` in user functions and in the data thread.

    Elsewhere, and in child processes that user code forks, ``os._exit`` works as usual.
    """
    own = os.getpid()

    def leave(status: int) -> NoReturn:
        reads = threading.current_thread().name.startswith(DATA_THREAD)
        if (where.now.phase or reads) and os.getpid() == own:
            raise LeftProcessError(f"os._exit({status})")
        real(status)

    os._exit = leave
