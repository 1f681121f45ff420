"""Reading text that anybody may have damaged: never a hang, never an exception of another kind.

Only regular files are opened (no fifo, no device, no folder), no more is read than a file of its
kind can hold, text is strict UTF-8, and JSON is what the standard says: no NaN, no number beyond 64
bits or a double, no lone surrogate, and nothing nested deeper than our own writers do.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

MOST_BYTES = 1 << 30  # of a file that is read whole
MOST_LINE_BYTES = 256 << 20
_BLOCK = 1 << 20
_DEEPEST = 64
_LONGEST_INT = 20  # characters of a number of 64 bits


class NotAFileError(OSError):
    """What stands there is no regular file, or larger than any of its kind."""


def open_regular(path: str | Path) -> BinaryIO:
    """The file, for reading, if it is one.

    Raises:
        OSError: It is not there, cannot be read, or is something other than a regular file.
    """
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        mode = os.fstat(number).st_mode
        if stat.S_ISDIR(mode):
            raise NotAFileError(errno.EISDIR, "is a folder", str(path))
        if not stat.S_ISREG(mode):
            raise NotAFileError(errno.EINVAL, "is no regular file", str(path))
        return os.fdopen(number, "rb")
    except BaseException:
        os.close(number)
        raise


def read_bytes(path: str | Path, *, most: int = MOST_BYTES) -> bytes:
    """The whole file.

    Raises:
        OSError: See ``open_regular``, or it is larger than ``most`` bytes.
    """
    with open_regular(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise NotAFileError(errno.EFBIG, f"is larger than {most:,} bytes", str(path))
    return data


def read_text(path: str | Path, *, most: int = MOST_BYTES) -> str:
    """The whole file as UTF-8.

    Raises:
        OSError: See ``read_bytes``.
        ValueError: It is no UTF-8 text; with the line.
    """
    return text_of(read_bytes(path, most=most))


def text_of(data: bytes) -> str:
    """UTF-8, strictly.

    Raises:
        ValueError: With the line at which it is something else.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line}: byte 0x{data[error.start]:02x} is no UTF-8") from None


def lines_of(file: BinaryIO, *, at: int = 0) -> Iterator[tuple[int, bytes]]:
    """Each whole line without its end, with the offset behind it, from the byte ``at`` on.

    What follows the last line end is left out: it was being written.

    Raises:
        ValueError: A line is longer than any of ours.
    """
    file.seek(at)
    rest = b""
    while block := file.read(_BLOCK):
        *whole, rest = (rest + block).split(b"\n")
        for line in whole:
            at += len(line) + 1
            yield at, line
        if len(rest) > MOST_LINE_BYTES:
            raise ValueError(f"a line of more than {MOST_LINE_BYTES:,} bytes")


def lines_backwards(file: BinaryIO, *, end: int) -> Iterator[bytes]:
    """The whole lines that end at the byte ``end`` or before it, the last one first."""
    rest = b""
    while end > 0:
        start = max(0, end - _BLOCK)
        file.seek(start)
        first, *whole = (file.read(end - start) + rest).split(b"\n")
        yield from (line for line in reversed(whole) if line)
        rest, end = first, start
    if rest:
        yield rest


def parse_json(text: str) -> Any:
    """One JSON value.

    Raises:
        ValueError: It is none; in one line.
    """
    try:
        found = json.loads(text, parse_constant=_no_number, parse_int=_int, parse_float=_float)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at character {error.pos + 1}") from None
    if text.count("[") + text.count("{") > _DEEPEST and _is_deep(found):
        raise ValueError(f"nested more than {_DEEPEST} deep")
    if "\\u" in text:
        _check_surrogates(found)
    return found


def parse_object(text: str) -> dict[str, Any]:
    """One JSON object.

    Raises:
        ValueError: It is none; in one line.
    """
    found = parse_json(text)
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    return found


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")


def _int(text: str) -> int:
    if len(text) > _LONGEST_INT:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _float(text: str) -> float:
    number = float(text) if len(text) <= 400 else float("inf")
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"number {text[:20]} is too large")
    return number


def _is_deep(value: Any) -> bool:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(_DEEPEST):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return False
    return True


def _inside(outer: dict[str, Any] | list[Any]) -> list[Any]:
    items = outer.values() if isinstance(outer, dict) else outer
    return [item for item in items if isinstance(item, dict | list)]


def _check_surrogates(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("half a surrogate pair in a text") from None
