"""Reading a run's journal: numbered entries, the older ones folded, many to a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lazarus.errors import LazarusError

FOLD = 1000  # entries of a folded file
_TRIES = 20  # each means that entries were folded while they were read


def folded_path(folder: Path, number: int) -> Path:
    """The file that an entry is in once it is folded."""
    first = (number - 1) // FOLD * FOLD + 1
    return folder / f"{first:09d}-{first + FOLD - 1:09d}.jsonl"


def last_number(folder: Path) -> int:
    """Of the newest entry; 0 where there is none."""
    single = (int(path.stem) for path in folder.glob("*.json"))
    folded = (int(path.stem.rpartition("-")[2]) for path in folder.glob("*.jsonl"))
    return max((*single, *folded), default=0)


def read_journal(folder: Path) -> list[dict[str, Any]]:
    """All entries in order, of a run that may be under way.

    Raises:
        LazarusError: A number is missing.
        ValueError: A file is no JSON.
    """
    for _ in range(_TRIES):
        try:
            return _read(folder)
        except FileNotFoundError:  # folded since it was listed
            continue
    raise LazarusError(f"journal {folder} changes faster than it can be read")


def _read(folder: Path) -> list[dict[str, Any]]:
    single = list(folder.glob("*.json"))  # first: what is gone by then is in a folded file
    paths = sorted([*single, *folder.glob("*.jsonl")], key=lambda path: path.stem)
    entries: list[dict[str, Any]] = []
    for path in paths:
        number = int(path.stem.partition("-")[0])
        if number > len(entries) + 1:
            raise LazarusError(
                f"journal {folder} lacks entry {len(entries) + 1}, but has {path.name}"
            )
        lines = path.read_text(encoding="utf-8").splitlines()
        entries += [json.loads(line) for line in lines[len(entries) + 1 - number :]]
    return entries
