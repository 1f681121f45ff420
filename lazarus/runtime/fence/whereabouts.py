"""Notes of which user function a rank is in, kept in a file that outlives the process.

The training thread writes what it is about to do into a small memory-mapped file in its node's
folder, which takes a few microseconds and no system call. After the process has died, the driver
reads the note and whatever ``faulthandler`` wrote during the crash.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from lazarus.basics.tracebacks import clean, place_in_crash, shown_crash
from lazarus.control.messages import WorkerDied

_SIZE = 4096  # bytes of the mapped file
_MOST_IDS = 64  # sample ids in a note, at most
_TAIL_BYTES = 4096  # bytes read of a crash report
_ENCODER = msgspec.json.Encoder()  # a note is written a dozen times in each step


@dataclass(frozen=True, kw_only=True, slots=True)
class Note:
    """What the training thread is doing. ``phase`` is empty outside user functions."""

    generation: int = 0
    rank: int = -1
    step: int = 0
    phase: str = ""
    sample_ids: tuple[int, ...] = ()
    place: str = ""  # where the user's function is defined


class Whereabouts:
    """Writes notes about this process's training thread; without a file, keeps them in memory.

    The owner sets ``step``, ``generation``, ``rank`` and ``places`` (phase -> where the user's
    function is defined); every note carries them.
    """

    def __init__(self, file: mmap.mmap | None = None) -> None:
        self.now = Note()
        self.step, self.generation, self.rank = 0, 0, -1
        self.places: Mapping[str, str] = {}
        self._file = file

    @classmethod
    def in_folder(cls, folder: Path, local_rank: int) -> Whereabouts:
        """Create the note file of this rank in its node's folder."""
        path = _note_path(folder, local_rank)
        path.write_bytes(bytes(_SIZE))
        with path.open("r+b") as opened:
            return cls(mmap.mmap(opened.fileno(), _SIZE))

    def enter(
        self, phase: str, sample_ids: Sequence[int] | NDArray[np.int64] = (), *, of: str = ""
    ) -> None:
        """Note that the training thread is about to call a user function.

        Args:
            phase: What the rank does.
            sample_ids: Of the micro-batch.
            of: The phase whose user function is called; empty: ``phase``.
        """
        self.now = Note(
            generation=self.generation,
            rank=self.rank,
            step=self.step,
            phase=phase,
            sample_ids=tuple(np.asarray(sample_ids[:_MOST_IDS], dtype=np.int64).tolist()),
            place=self.places.get(of or phase, ""),
        )
        self._write()

    def leave(self) -> None:
        """Note that the training thread has returned from user code."""
        if self.now.phase:
            self.now = Note(generation=self.generation, rank=self.rank, step=self.step)
            self._write()

    def _write(self) -> None:
        if self._file is None:
            return
        text = _encoded(self.now)
        if len(text) > _SIZE - 8:
            text = _encoded(replace(self.now, sample_ids=(), place=""))
        head = len(text).to_bytes(4, "little") + zlib.crc32(text).to_bytes(4, "little")
        self._file[: 8 + len(text)] = head + text


def _encoded(note: Note) -> bytes:
    try:
        return _ENCODER.encode(note)
    except UnicodeEncodeError:  # a file name with bytes that are no UTF-8
        return json.dumps(asdict(note)).encode()


def read_note(folder: Path, local_rank: int) -> Note | None:
    """The last note of a process that has ended; None if there is no intact note."""
    try:
        with _note_path(folder, local_rank).open("rb") as file:
            held = file.read(_SIZE)
        size = int.from_bytes(held[:4], "little")
        text = held[8 : 8 + size]
        if not text or zlib.crc32(text) != int.from_bytes(held[4:8], "little"):
            return None
        found = json.loads(text)
        return Note(**{**found, "sample_ids": tuple(found["sample_ids"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def crash_path(folder: Path, local_rank: int) -> Path:
    """The file that ``faulthandler`` writes when this rank's process crashes."""
    return folder / f"crash-{local_rank}"


def read_crash(folder: Path, local_rank: int) -> str:
    """The beginning of what ``faulthandler`` wrote: the signal and the failing thread's stack."""
    with contextlib.suppress(OSError), crash_path(folder, local_rank).open("rb") as file:
        return clean(file.read(_TAIL_BYTES).decode("utf-8", "replace"), limit=_TAIL_BYTES)
    return ""


class LastWords:
    """Notes of processes on this machine that have ended. Safe to use from any thread.

    A node's folder may be removed before the end of its processes is noticed, so ``keep`` saves
    their notes in time.

    Args:
        scratch: Directory that holds the folders of the nodes.
    """

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._kept: dict[str, tuple[Note, str]] = {}

    def keep(self, name: str) -> None:
        """Save the notes of the killed process ``name`` before its node's folder is removed."""
        note, crash = self._read(name)
        if note is not None or crash:
            self._kept[name] = (note or Note(), crash)

    def of(self, name: str, cause: str) -> WorkerDied:
        """The message that process ``name`` has died, with what the process had noted."""
        note, crash = self._read(name)
        if note is None and not crash:
            note, crash = self._kept.get(name, (None, ""))
        note = note or Note()
        return WorkerDied(
            worker=name,
            cause=clean(cause),
            generation=note.generation,
            rank=note.rank,
            step=note.step,
            phase=note.phase,
            sample_ids=note.sample_ids,
            place=place_in_crash(crash) or note.place,
            crash=crash,
            shown=shown_crash(crash) or (f"In your code:\n  {note.place}" if note.place else ""),
        )

    def _read(self, name: str) -> tuple[Note | None, str]:
        key, _, local_rank = name.rpartition(".")
        folder = self._scratch / key
        return read_note(folder, int(local_rank)), read_crash(folder, int(local_rank))


def _note_path(folder: Path, local_rank: int) -> Path:
    return folder / f"note-{local_rank}"
