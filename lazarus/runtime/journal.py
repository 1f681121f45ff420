"""The controller's journal: one numbered sequence of entries, each created if absent (rule 36).

Claims and commits race for the same next number, so whoever claims has read every commit before it.
Entries are JSON files; a reader never sees half an entry.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lazarus.errors import LazarusError

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
        self._next = 1 + max((int(path.stem) for path in folder.glob("*.json")), default=0)

    def append(self, entry: Mapping[str, Any]) -> int:
        """Write the next entry whole or not at all.

        Raises:
            JournalConflictError: The number is taken.
            OSError: The storage failed; the controller must end.
        """
        number = self._next
        final = self._folder / f"{number:09d}.json"
        draft = self._folder / f".{number:09d}.{os.getpid()}"
        with draft.open("w", encoding="utf-8") as out:
            json.dump(entry, out, separators=(",", ":"))
            if entry["kind"] in _DURABLE:
                out.flush()
                os.fsync(out.fileno())
        try:
            os.link(draft, final)
        except FileExistsError:
            raise JournalConflictError(number=number) from None
        finally:
            draft.unlink()
        self._next = number + 1
        return number


def read_journal(folder: Path) -> list[dict[str, Any]]:
    """All entries in order.

    Raises:
        LazarusError: A number is missing.
    """
    paths = sorted(folder.glob("*.json"))
    for expected, path in enumerate(paths, start=1):
        if int(path.stem) != expected:
            raise LazarusError(f"journal {folder} lacks entry {expected}, but has {path.name}")
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]
