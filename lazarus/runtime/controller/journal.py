"""The controller's journal: a numbered sequence of entries, each created only if it is absent.

A new controller's claim and an old controller's commit compete for the same next number, so a
controller that claims has read every commit before (rule 36 of docs/protocol.md). Now and then all
entries are folded into one state, so that a restart reads that state and a short tail, however long
the run is. ``lazarus.record.journal_reader`` describes the files.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lazarus.basics.files import created, synced
from lazarus.errors import JournalError, LazarusError
from lazarus.record import journal_reader
from lazarus.record.journal_reader import ARCHIVE, STATES, entry_path, state_path

FOLD_ENTRIES = 256  # the journal is folded when its tail has this many entries, or FOLD_BYTES
FOLD_BYTES = 8 << 20

_DURABLE = frozenset({"header", "term", "serial", "claim", "resume", "evidence", "manifest", "end"})


class JournalConflictError(LazarusError):
    """Another controller wrote this entry and has taken over; this controller must end."""

    def __init__(self, *, number: int) -> None:
        super().__init__(
            f"journal entry {number} exists already: another controller has taken over"
        )
        self.number = number


class Journal:
    """Appends entries to the journal in a folder, which must be on storage that outlives nodes.

    Raises:
        JournalError: The folder holds a journal of an earlier format.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        if journal_reader.numbers_in(folder) and not (folder / STATES).is_dir():
            reason = (
                f"was written by an earlier version; this one writes format {journal_reader.FORMAT}"
            )
            raise JournalError(path=str(folder), reason=reason)
        (folder / STATES).mkdir(exist_ok=True)
        self._next = 1 + journal_reader.last_number(folder)
        self._archived = journal_reader.last_archived(folder)
        folded = max(journal_reader.states_in(folder), default=0)
        tail = [n for n in journal_reader.numbers_in(folder) if n > folded]
        self._tail_entries = len(tail)
        self._tail_bytes = sum(entry_path(folder, n).stat().st_size for n in tail)
        self._lines: dict[int, bytes] = {}  # archive lines of entries that are not archived yet

    @property
    def is_long(self) -> bool:
        """Whether the tail is long enough to be folded."""
        return self._tail_entries >= FOLD_ENTRIES or self._tail_bytes >= FOLD_BYTES

    def append(self, entry: Mapping[str, Any]) -> int:
        """Write the next entry, whole or not at all. Returns its number.

        Raises:
            JournalConflictError: Another controller wrote the entry of this number.
            OSError: The storage failed; the controller must end.
        """
        number = self._next
        final = entry_path(self._folder, number)
        data = journal_reader.sealed(number, "entry", entry)
        draft = self._folder / f".{final.stem}.{os.getpid()}"
        if not created(final, data, draft=draft, is_durable=entry["kind"] in _DURABLE):
            raise JournalConflictError(number=number)
        # The file of an archived entry is gone, so its number can be created again: check that no
        # folded state covers the number.
        if max(journal_reader.states_in(self._folder), default=0) >= number:
            final.unlink()
            raise JournalConflictError(number=number)
        self._next = number + 1
        self._tail_entries += 1
        self._tail_bytes += len(data)
        self._lines[number] = archived_line(number, entry)
        return number

    def put_off(self) -> None:
        """After a failed fold: do not fold before the tail has grown by the same length again."""
        self._tail_entries = self._tail_bytes = 0

    def fold(self, state: str) -> None:
        """Write the folded state of all entries so far.

        The previous state and the entries after it are kept, in case the new file gets damaged;
        older entries move to the archive and older states are deleted.

        Args:
            state: The state as a JSON object.

        Raises:
            OSError: There was no space, or the storage failed; no entry is lost.
        """
        number = self._next - 1
        with synced(state_path(self._folder, number)) as out:
            out.write(journal_reader.sealed(number, "state", state))
        before = [n for n in journal_reader.states_in(self._folder) if n < number]
        self._tail_entries = self._tail_bytes = 0
        if before:
            self._archive(upto=before[-1])
        for older in before[:-1]:
            state_path(self._folder, older).unlink(missing_ok=True)

    def _archive(self, *, upto: int) -> None:
        """Move the entries up to a number to the archive; each is deleted only once it is there."""
        going = [n for n in journal_reader.numbers_in(self._folder) if n <= upto]
        lines = []
        for number in going:
            line = self._lines.pop(number, b"")
            if number > self._archived:  # an earlier controller's entry is read from its file
                entry = journal_reader.entry_of
                lines.append(line or archived_line(number, entry(self._folder, number)))
        if lines:
            with journal_reader.appended(self._folder / ARCHIVE) as out:
                out.write(b"".join(lines))
            self._archived = going[-1]
        for number in going:
            entry_path(self._folder, number).unlink(missing_ok=True)


def archived_line(number: int, entry: Mapping[str, Any]) -> bytes:
    """An entry's line in the archive: the whole entry, without the ``lanes`` of its commits."""
    if isinstance(commits := entry.get("commits"), list):
        kept = [{k: v for k, v in commit.items() if k != "lanes"} for commit in commits]
        entry = {**entry, "commits": kept}
    return journal_reader.sealed(number, "entry", entry) + b"\n"
