"""Which of the user's functions a rank is in, noted where the death of its process leaves it.

A process that is gone can say nothing more. So the training thread writes what it is about to do
into a small mapped file of its node's folder: a few microseconds each, no system call. Whoever sees
the process end reads the note, and what ``faulthandler`` wrote while the process crashed.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lazarus.basics.tracebacks import clean, place_in_crash, shown_crash
from lazarus.control.messages import WorkerDied

_SIZE = 4096  # of the mapped file
_MOST_IDS = 64  # sample ids that a note carries
_TAIL_BYTES = 4096  # of what a crashing process wrote


@dataclass(frozen=True, kw_only=True, slots=True)
class Note:
    """What the training thread was doing. ``phase`` is empty outside the user's functions."""

    generation: int = 0
    rank: int = -1
    step: int = 0
    phase: str = ""
    sample_ids: tuple[int, ...] = ()
    place: str = ""  # where the user's function is defined


class Whereabouts:
    """What this process notes of its training thread; without a file, in memory only.

    Who knows it sets ``step``, ``generation``, ``rank`` and ``places`` (phase -> where the user's
    function is defined); every note carries them.
    """

    def __init__(self, file: mmap.mmap | None = None) -> None:
        self.now = Note()
        self.step, self.generation, self.rank = 0, 0, -1
        self.places: Mapping[str, str] = {}
        self._file = file

    @classmethod
    def in_folder(cls, folder: Path, local_rank: int) -> Whereabouts:
        """Notes go into the node's folder."""
        path = _note_path(folder, local_rank)
        path.write_bytes(bytes(_SIZE))
        with path.open("r+b") as opened:
            return cls(mmap.mmap(opened.fileno(), _SIZE))

    def enter(self, phase: str, sample_ids: Sequence[int] | NDArray[np.int64] = ()) -> None:
        """The thread is about to call a function of the user's."""
        self.now = Note(
            generation=self.generation,
            rank=self.rank,
            step=self.step,
            phase=phase,
            sample_ids=tuple(int(i) for i in sample_ids[:_MOST_IDS]),
            place=self.places.get(phase, ""),
        )
        self._write()

    def leave(self) -> None:
        """The thread is in the library's own code again."""
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
    return json.dumps(asdict(note), separators=(",", ":")).encode()


def read_note(folder: Path, local_rank: int) -> Note | None:
    """The last note of a process that has ended; None if it left none that is whole."""
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
    """Where ``faulthandler`` writes while the process of this rank crashes."""
    return folder / f"crash-{local_rank}"


def read_crash(folder: Path, local_rank: int) -> str:
    """What a crashing process wrote, its beginning: signal and the stack of the thread at fault."""
    with contextlib.suppress(OSError), crash_path(folder, local_rank).open("rb") as file:
        return clean(file.read(_TAIL_BYTES).decode("utf-8", "replace"), limit=_TAIL_BYTES)
    return ""


class LastWords:
    """What processes of this machine noted before they ended.

    The folder of a node that is taken down may be gone before the end of its processes is seen:
    what they noted is kept in time. For any thread.

    Args:
        scratch: Has the folders of the nodes.
    """

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._kept: dict[str, tuple[Note, str]] = {}

    def keep(self, name: str) -> None:
        """The process has been killed, and the folder of its node is about to be removed."""
        note, crash = self._read(name)
        if note is not None or crash:
            self._kept[name] = (note or Note(), crash)

    def of(self, name: str, cause: str) -> WorkerDied:
        """The news of a death, with what the process noted of the user's code that it was in."""
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
