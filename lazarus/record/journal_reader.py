"""Reading a run's journal: numbered entries, and what they have come to.

A journal is a folder. What its controller journals are the files ``000000001.json``, ... Now and
then all that they tell is folded into one state, ``state/000000256.json``, with which a restart
begins; the two newest states stay. Entries that the older of the two covers move to
``archive.jsonl`` without the vectors of their commits, and the expert loads of those to
``loads.bin``; a restart reads neither. Every file, and every line of the archive, is
``{"n": number, "sum": checksum, "entry" or "state": content}``.

Journals of format 1 have no ``state`` folder and no checksums: entries alone, or a thousand to a
file. They are read, and never written.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

from lazarus.basics.careful import lines_backwards, lines_of, open_regular, parse_object, read_bytes
from lazarus.errors import JournalError, LazarusError

FORMAT = 2
ARCHIVE = "archive.jsonl"
LOADS = "loads.bin"
STATES = "state"
MOST_BYTES = 1 << 30  # of one entry, or one state
TRIES = 20  # each means that entries were folded while they were read
_SINGLE = re.compile(r"(\d{9})\.json")
_OLD_FOLD = re.compile(r"(\d{9})-(\d{9})\.jsonl")  # of format 1
_SEAL = re.compile(rb'\{"n":(\d{1,12}),"sum":"([0-9a-f]{16})","(entry|state)":')


# ---- one file ------------------------------------------------------------------------------------


def sealed(number: int, kind: str, content: Mapping[str, Any] | str) -> bytes:
    """One line: the content, an object or its JSON text, with its number and a checksum of both."""
    if not isinstance(content, str):
        content = json.dumps(content, separators=(",", ":"))
    text = content.encode()
    head = f'{{"n":{number},"sum":"{_sum(number, kind, text)}","{kind}":'
    return head.encode() + text + b"}"


def unsealed(data: bytes, kind: str, *, number: int | None = None) -> tuple[int, dict[str, Any]]:
    """Number and content of a line.

    Args:
        number: What the place of the line says that it should be.

    Raises:
        ValueError: Not one bit is believed.
    """
    head = _SEAL.match(data)
    if head is None or head[3].decode() != kind or not data.endswith(b"}"):
        raise ValueError("is damaged: it has not the form of a journal's file")
    found, text = int(head[1]), data[head.end() : -1]
    if _sum(found, kind, text).encode() != head[2]:
        raise ValueError("is damaged: its checksum does not match")
    if number is not None and found != number:
        raise ValueError(f"is in the wrong place: it has number {found}")
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError("holds no object")
    return found, content


def _sum(number: int, kind: str, text: bytes) -> str:
    check = blake2b(f"{number} {kind}\n".encode(), digest_size=8)
    check.update(text)
    return check.hexdigest()


def entry_path(folder: Path, number: int) -> Path:
    """Where an entry is until it is archived."""
    return folder / f"{number:09d}.json"


def state_path(folder: Path, number: int) -> Path:
    """Where the state after an entry is, if it was folded there."""
    return folder / STATES / f"{number:09d}.json"


def _content(path: Path, kind: str, number: int) -> dict[str, Any]:
    """The content of one file.

    Raises:
        FileNotFoundError: It is not there (any more).
        JournalError: It cannot be taken for true.
    """
    try:
        return unsealed(read_bytes(path, most=MOST_BYTES).rstrip(b"\n"), kind, number=number)[1]
    except FileNotFoundError:
        raise
    except OSError as error:
        raise JournalError(path=str(path), reason=error.strerror or str(error)) from error
    except (ValueError, RecursionError) as error:
        raise JournalError(path=str(path), reason=str(error)) from error


def entry_of(folder: Path, number: int) -> dict[str, Any]:
    """One entry that is not archived yet.

    Raises:
        FileNotFoundError, JournalError: It is not there, or cannot be taken for true.
    """
    return _content(entry_path(folder, number), "entry", number)


@contextmanager
def appended(path: Path) -> Iterator[BinaryIO]:
    """The end of the archive, to write whole lines to; they are durable afterwards."""
    with path.open("ab+") as out:
        out.truncate(_whole_bytes(out))
        yield out
        out.flush()
        os.fsync(out.fileno())


# ---- what there is -------------------------------------------------------------------------------


def numbers_in(folder: Path) -> list[int]:
    """Numbers of the files that have the name of an entry, or of a state; others are foreign."""
    try:
        names = [item.name for item in os.scandir(folder)]
    except FileNotFoundError:
        return []
    return sorted(int(found[1]) for name in names if (found := _SINGLE.fullmatch(name)))


def states_in(folder: Path) -> list[int]:
    """Numbers of the entries behind which the state was folded, ascending."""
    return numbers_in(folder / STATES)


def last_archived(folder: Path) -> int:
    """Number of the newest entry in the archive; 0 where there is none."""
    try:
        with open_regular(folder / ARCHIVE) as file:
            whole = _whole_bytes(file)
            line = next(lines_backwards(file, end=max(0, whole - 1)), b"")
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise JournalError(path=str(folder / ARCHIVE), reason=str(error.strerror)) from error
    try:
        return unsealed(line, "entry")[0] if line else 0
    except ValueError:
        return 0  # what it had is archived again, or was thrown away with it


def _whole_bytes(file: BinaryIO) -> int:
    """Where the last line end is, that of half a line left out."""
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - 1))
    if end == 0 or file.read(1) == b"\n":
        return end
    return end - len(next(lines_backwards(file, end=end), b""))


def last_number(folder: Path) -> int:
    """Of the newest entry; 0 where there is none."""
    return max((*numbers_in(folder), *states_in(folder), last_archived(folder)), default=0)


# ---- for a restart -------------------------------------------------------------------------------


def newest_state(folder: Path) -> tuple[int, dict[str, Any]] | None:
    """The newest folded state that is sound, with its number; None where none was folded yet.

    Raises:
        JournalError: None is sound.
    """
    problem: JournalError | None = None
    for number in reversed(states_in(folder)):
        try:
            return number, _content(state_path(folder, number), "state", number)
        except (JournalError, FileNotFoundError) as error:
            problem = error if isinstance(error, JournalError) else problem
    if problem is not None and not entry_path(folder, 1).exists():
        raise problem
    return None


def entries_after(folder: Path, number: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """The entries behind one, each with its number; read one by one.

    Raises:
        JournalError: One is damaged, or missing.
    """
    for later in numbers_in(folder):
        if later <= number:
            continue
        path = entry_path(folder, later)
        if later != number + 1:
            lacks = f"entry {number + 1} is missing, but there is {path.name}"
            raise JournalError(path=str(folder), reason=lacks)
        yield later, _content(path, "entry", later)
        number = later


# ---- for readers of the whole --------------------------------------------------------------------


def read_journal(folder: Path) -> list[dict[str, Any]]:
    """All entries in order, of a run that may be under way. See ``each_entry``."""
    for _ in range(TRIES):
        try:
            return list(each_entry(folder))
        except FileNotFoundError:  # archived since it was listed
            continue
    raise LazarusError(f"journal {folder} changes faster than it can be read")


def each_entry(folder: Path) -> Iterator[dict[str, Any]]:
    """Every entry in order. Archived commits say which steps they are of, and no more.

    Raises:
        FileNotFoundError: An entry was archived meanwhile: read anew.
        JournalError: An entry is damaged, or missing.
    """
    if not (folder / STATES).is_dir():
        yield from _each_of_format_1(folder)
        return
    single = numbers_in(folder)  # first: what is gone by then is in the archive
    number = 0
    for later, entry in _archived(folder):
        if later == number + 1:
            number = later
            yield entry
    for later, entry in _singles(folder, [n for n in single if n > number]):
        if later != number + 1:
            lacks = f"lacks entry {number + 1}, but has {entry_path(folder, later).name}"
            raise JournalError(path=str(folder), reason=lacks)
        number = later
        yield entry


def _singles(folder: Path, numbers: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number in numbers:
        yield number, _content(entry_path(folder, number), "entry", number)


def _archived(folder: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    path, line = folder / ARCHIVE, 0
    try:
        with open_regular(path) as file:
            for _, data in lines_of(file):
                line += 1
                yield unsealed(data, "entry")
    except FileNotFoundError:
        return
    except OSError as error:
        raise JournalError(path=str(path), reason=str(error.strerror)) from error
    except (ValueError, RecursionError) as error:
        raise JournalError(path=f"{path}:{line}", reason=str(error)) from error


def _each_of_format_1(folder: Path) -> Iterator[dict[str, Any]]:
    names = sorted(path.name for path in folder.iterdir())
    number = 0
    for name in names:
        match = _OLD_FOLD.fullmatch(name) or _SINGLE.fullmatch(name)
        if match is None:
            continue
        first = int(match[1])
        if first > number + 1:
            lacks = f"lacks entry {number + 1}, but has {name}"
            raise JournalError(path=str(folder), reason=lacks)
        for entry in _old_entries(folder / name)[number + 1 - first :]:
            number += 1
            yield entry


def _old_entries(path: Path) -> list[dict[str, Any]]:
    try:
        lines = read_bytes(path, most=MOST_BYTES).decode("utf-8").split("\n")
        return [parse_object(line) for line in lines if line]
    except FileNotFoundError:
        raise
    except OSError as error:
        raise JournalError(path=str(path), reason=str(error.strerror)) from error
    except ValueError as error:
        raise JournalError(path=str(path), reason=str(error)) from error
