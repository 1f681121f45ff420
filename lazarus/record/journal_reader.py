"""Read a run's journal: numbered entries, and states that summarise them.

A journal is a folder. Its controller writes entries as ``000000001.json``, ... From time to time,
all entries so far are folded into one state, such as ``state/000000256.json``, from which a restart
begins; the two newest states are kept. Entries covered by the older of the two move to
``archive.jsonl`` without the vectors of their commits, whose expert loads move to ``loads.bin``; a
restart reads neither file. Every file, and every line of the archive, has the form
``{"n": number, "sum": checksum, "entry" or "state": content}``.

Journals of format 1 have no ``state`` folder and no checksums, and a file holds one entry or a
thousand. They can be read, but are not written any more.
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
MOST_BYTES = 1 << 30  # largest size of one entry or one state
TRIES = 20  # attempts to read, each disturbed by entries being archived meanwhile
_SINGLE = re.compile(r"(\d{9})\.json")
_OLD_FOLD = re.compile(r"(\d{9})-(\d{9})\.jsonl")  # format 1
_SEAL = re.compile(rb'\{"n":(\d{1,12}),"sum":"([0-9a-f]{16})","(entry|state)":')


# ---- one file ------------------------------------------------------------------------------------


def sealed(number: int, kind: str, content: Mapping[str, Any] | str) -> bytes:
    """Encode an entry or state as one line, with its number and a checksum.

    Args:
        number: Number of the entry, or of the last entry in the state.
        kind: "entry" or "state".
        content: A JSON-able object, or its JSON text.
    """
    if not isinstance(content, str):
        content = json.dumps(content, separators=(",", ":"))
    text = content.encode()
    head = f'{{"n":{number},"sum":"{_sum(number, kind, text)}","{kind}":'
    return head.encode() + text + b"}"


def unsealed(data: bytes, kind: str, *, number: int | None = None) -> tuple[int, dict[str, Any]]:
    """Check a line and return its number and content.

    Args:
        data: The line, without its end.
        kind: The expected kind, "entry" or "state".
        number: The expected number; None: any.

    Raises:
        ValueError: The line is damaged, or has another kind or number.
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
    """Path of an entry that is not archived yet."""
    return folder / f"{number:09d}.json"


def state_path(folder: Path, number: int) -> Path:
    """Path of the state after entry ``number``, if there is one."""
    return folder / STATES / f"{number:09d}.json"


def _content(path: Path, kind: str, number: int) -> dict[str, Any]:
    """The checked content of one file.

    Raises:
        FileNotFoundError: The file does not exist (any more).
        JournalError: The file cannot be read, or is damaged.
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
    """Read one entry that is not archived yet.

    Raises:
        FileNotFoundError: The entry does not exist, or was archived.
        JournalError: The entry cannot be read, or is damaged.
    """
    return _content(entry_path(folder, number), "entry", number)


@contextmanager
def appended(path: Path) -> Iterator[BinaryIO]:
    """Open a file to append whole lines. A half-written last line is removed first.

    The lines are durable when the context ends.
    """
    with path.open("ab+") as out:
        out.truncate(_whole_bytes(out))
        yield out
        out.flush()
        os.fsync(out.fileno())


# ---- listing -------------------------------------------------------------------------------------


def numbers_in(folder: Path) -> list[int]:
    """Sorted numbers of the files named like an entry or a state; other files are ignored."""
    try:
        names = [item.name for item in os.scandir(folder)]
    except FileNotFoundError:
        return []
    return sorted(int(found[1]) for name in names if (found := _SINGLE.fullmatch(name)))


def states_in(folder: Path) -> list[int]:
    """Sorted numbers of the states: each is the number of the last entry that it covers."""
    return numbers_in(folder / STATES)


def last_archived(folder: Path) -> int:
    """Number of the newest entry in the archive; 0 if the archive is empty or damaged there.

    Raises:
        JournalError: The archive cannot be read.
    """
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
        return 0  # its entries are archived again, or are lost


def _whole_bytes(file: BinaryIO) -> int:
    """Bytes of the file up to its last line end; an incomplete last line does not count."""
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - 1))
    if end == 0 or file.read(1) == b"\n":
        return end
    return end - len(next(lines_backwards(file, end=end), b""))


def last_number(folder: Path) -> int:
    """Number of the newest entry; 0 for an empty journal."""
    return max((*numbers_in(folder), *states_in(folder), last_archived(folder)), default=0)


# ---- for a restart -------------------------------------------------------------------------------


def newest_state(folder: Path) -> tuple[int, dict[str, Any]] | None:
    """The newest undamaged state, with its number; None if a restart must read all entries.

    Raises:
        JournalError: All states are damaged, and entry 1 is archived.
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
    """Yield the entries after entry ``number``, each with its number.

    Raises:
        JournalError: An entry is damaged, or missing.
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


# ---- reading the whole journal -------------------------------------------------------------------


def read_journal(folder: Path) -> list[dict[str, Any]]:
    """All entries in order, see ``each_entry``. The run may still be writing the journal.

    Raises:
        JournalError: An entry is damaged, or missing.
        LazarusError: Entries are archived faster than they can be read.
    """
    for _ in range(TRIES):
        try:
            return list(each_entry(folder))
        except FileNotFoundError:  # archived since it was listed
            continue
    raise LazarusError(f"journal {folder} changes faster than it can be read")


def each_entry(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield every entry in order. Of archived commits, only the steps are known.

    Raises:
        FileNotFoundError: An entry was archived meanwhile; start reading again.
        JournalError: An entry is damaged, or missing.
    """
    if not (folder / STATES).is_dir():
        yield from _each_of_format_1(folder)
        return
    single = numbers_in(folder)  # listed first: entries that vanish later are in the archive
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
