"""How a controller ends that cannot continue: its failure, and disk space reserved to record it."""

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

_RESERVE_BYTES = 16 << 10  # twice the last entry of a journal plus the last line of a record


class UnrecordedError(LazarusError):
    """The journal or the record could not be written, so the run must end.

    Attributes:
        is_full: The storage is full or over its quota.
        folder: The run's folder.
    """

    def __init__(self, problem: OSError, *, folder: Path) -> None:
        self.is_full = problem.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "is full" if self.is_full else "cannot be written"
        super().__init__(f"the run's folder {what}: {folder}: {problem.strerror or problem}")
        self.folder = folder


@contextmanager
def recording(folder: Path) -> Iterator[None]:
    """Context in which the journal and the record of the run in ``folder`` are written.

    Raises:
        UnrecordedError: The storage raised an OSError.
    """
    try:
        yield
    except OSError as problem:
        raise UnrecordedError(problem, folder=folder) from problem


class Reserve:
    """A file that takes disk space, deleted when a run on a full disk must record its end."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / ".reserve"
        with suppress(OSError):  # without the reserve the end may go unrecorded
            self._path.write_bytes(os.urandom(_RESERVE_BYTES))

    def release(self) -> None:
        """Delete the file, so that its space is free."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)


def unrecorded_end(state: Control, problem: UnrecordedError) -> tuple[Status, Failure]:
    """Status and failure of a run whose folder cannot be written.

    The status is "short" if a checkpoint exists, else "failed".
    """
    newest = max((c.step for c in state.storage.checkpoints), default=None)
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
    """Whether the checkpoints at ``place`` were in the run's folder that was removed."""
    return not place or Path(place.removeprefix("file://")).is_relative_to(folder)


def failure_of(problem: BaseException) -> Failure:
    """Describe the exception that ends the controller's process."""
    is_storage = isinstance(problem, OSError | UnrecordedError | JournalError | RecordError)
    lines = f"{type(problem).__name__}: {problem}".splitlines()
    return Failure(
        cause=Cause.STORAGE if is_storage else Cause.INTERNAL,
        message=lines[0],
        traceback="".join(traceback.format_exception(problem)),
    )
