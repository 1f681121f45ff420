"""How a controller that cannot go on says so: what failed, and room kept to write that down."""

from __future__ import annotations

import errno
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lazarus.control.cluster.state import Control
from lazarus.errors import JournalError, LazarusError, RecordError
from lazarus.failure import Cause, Failure, Status

_RESERVE_BYTES = 16 << 10  # the last entry of a journal and the last line of a record, twice over


class UnrecordedError(LazarusError):
    """The run's folder took neither journal nor record: nothing more may happen in this run."""

    def __init__(self, problem: OSError, *, folder: Path) -> None:
        self.is_full = problem.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "is full" if self.is_full else "cannot be written"
        super().__init__(f"the run's folder {what}: {folder}: {problem.strerror or problem}")
        self.folder = folder


@contextmanager
def recording(folder: Path) -> Iterator[None]:
    """Whoever writes journal or record of the run in ``folder`` does so in here.

    Raises:
        UnrecordedError: Storage refused.
    """
    try:
        yield
    except OSError as problem:
        raise UnrecordedError(problem, folder=folder) from problem


class Reserve:
    """Room kept free from the start, so that a run on a full disk can still record its end."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / ".reserve"
        with suppress(OSError):  # no room even for this: then the end goes unrecorded
            self._path.write_bytes(os.urandom(_RESERVE_BYTES))

    def release(self) -> None:
        with suppress(OSError):
            self._path.unlink(missing_ok=True)


def unrecorded_end(state: Control, problem: UnrecordedError) -> tuple[Status, Failure]:
    """How a run ends whose folder cannot be written: short, where a checkpoint stands."""
    newest = max((c.step for c in state.checkpoints), default=None)
    folder, place = problem.folder, state.config.checkpoint_url
    mend = "make room there" if problem.is_full else "make it writable"
    resume, said = str(folder), f"{problem}; step {state.step} is on record"
    if not folder.is_dir():
        mend, said, resume = "", f"the run's folder was removed: {folder}", place
        newest = None if went_along(place, folder) else newest
    stands = "no checkpoint stands"
    way_out = f"{mend} and start again" if mend else "start again"
    if newest is not None:
        stands = f"the checkpoint of step {newest} stands"
        way_out = f"{mend}, then: " if mend else "go on with: "
        way_out += f"lazarus train --resume {resume}"
    failure = Failure(
        cause=Cause.STORAGE,
        message=f"{said}, {stands}",
        way_out=way_out,
        step=state.step,
        url=str(problem.folder),
        operation="write",
    )
    return ("failed" if newest is None else "short"), failure


def went_along(place: str, folder: Path) -> bool:
    """Whether the checkpoints at ``place`` are gone with a run's folder that was removed."""
    return not place or Path(place.removeprefix("file://")).is_relative_to(folder)


def failure_of(problem: BaseException) -> Failure:
    """Why a controller's process ends."""
    is_storage = isinstance(problem, OSError | UnrecordedError | JournalError | RecordError)
    lines = f"{type(problem).__name__}: {problem}".splitlines()
    return Failure(
        cause=Cause.STORAGE if is_storage else Cause.INTERNAL,
        message=lines[0],
        traceback="".join(traceback.format_exception(problem)),
    )
