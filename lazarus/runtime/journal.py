"""The controller's journal: one numbered sequence of entries, each created if absent (rule 36).

Claims and commits race for the same next number, so whoever claims has read every commit before it.
Entries are JSON files; a reader never sees half an entry. Every thousand of them are folded into
one file, so that a long run does not leave millions; see ``lazarus.journals``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lazarus.errors import LazarusError
from lazarus.journals import FOLD, folded_path, last_number

_DURABLE = frozenset({"header", "term", "serial", "claim", "resume", "manifest", "end"})


class JournalConflictError(LazarusError):
    """Another controller wrote this number: it rules now, this one must end."""

    def __init__(self, *, number: int) -> None:
        super().__init__(
            f"journal entry {number} exists already: another controller has taken over"
        )
        self.number = number


class Journal:
    """Append-only, on storage that outlives nodes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._next = 1 + last_number(folder)

    def append(self, entry: Mapping[str, Any]) -> int:
        """Write the next entry whole or not at all.

        Raises:
            JournalConflictError: The number is taken.
            OSError: The storage failed; the controller must end.
        """
        number = self._next
        final = self._single(number)
        text = json.dumps(entry, separators=(",", ":"))
        if not self._create(final, text, is_durable=entry["kind"] in _DURABLE):
            raise JournalConflictError(number=number)
        # A number whose file was folded away can be created again; the folded one tells.
        if folded_path(self._folder, number).exists():
            final.unlink()
            raise JournalConflictError(number=number)
        self._next = number + 1
        if number % FOLD == 0:
            self._fold(number)
        return number

    def _single(self, number: int) -> Path:
        return self._folder / f"{number:09d}.json"

    def _create(self, final: Path, text: str, *, is_durable: bool) -> bool:
        """Whether the file was not there; it appears whole."""
        draft = self._folder / f".{final.stem}.{os.getpid()}"
        try:
            with draft.open("w", encoding="utf-8") as out:
                out.write(text)
                if is_durable:
                    out.flush()
                    os.fsync(out.fileno())
            os.link(draft, final)
        except FileExistsError:
            return False
        finally:
            draft.unlink(missing_ok=True)
        return True

    def _fold(self, last: int) -> None:
        """The newest entries into one file; only then do their own files go."""
        paths = [self._single(number) for number in range(last - FOLD + 1, last + 1)]
        lines = [path.read_text(encoding="utf-8") + "\n" for path in paths]
        self._create(folded_path(self._folder, last), "".join(lines), is_durable=True)
        for path in paths:
            path.unlink(missing_ok=True)
