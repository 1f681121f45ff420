"""Read files and JSON that may be damaged, without hanging or raising unexpected exceptions.

Only regular files are opened (no fifo, device or folder), and sizes are bounded. Text must be
UTF-8. JSON must follow the standard: no NaN, no number beyond 64 bits or the range of a double, no
lone surrogate; nesting is limited to 64 levels.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

MOST_BYTES = 1 << 30  # largest file that is read whole
MOST_LINE_BYTES = 256 << 20
_BLOCK = 1 << 20
_DEEPEST = 64
_LONGEST_INT = 20  # characters of a number of 64 bits


class NotAFileError(OSError):
    """A path is not a regular file, or the file is too large."""


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file for reading. Never blocks, not even on a fifo.

    Raises:
        OSError: The file does not exist or cannot be read.
        NotAFileError: The path is not a regular file.
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
    """Read a whole file.

    Raises:
        OSError: See ``open_regular``; or the file is larger than ``most`` bytes.
    """
    with open_regular(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise NotAFileError(errno.EFBIG, f"is larger than {most:,} bytes", str(path))
    return data


def read_text(path: str | Path, *, most: int = MOST_BYTES) -> str:
    """Read a whole file as UTF-8 text.

    Raises:
        OSError: See ``read_bytes``.
        ValueError: The file is not UTF-8; the message names the line.
    """
    return text_of(read_bytes(path, most=most))


def text_of(data: bytes) -> str:
    """Decode UTF-8.

    Raises:
        ValueError: The data is not UTF-8; the message names the line.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line}: byte 0x{data[error.start]:02x} is no UTF-8") from None


def lines_of(file: BinaryIO, *, at: int = 0) -> Iterator[tuple[int, bytes]]:
    """Yield each complete line from byte ``at`` on: the offset after the line, and its bytes.

    The bytes come without the line end. Text after the last line end is ignored, since its writer
    has not finished the line.

    Raises:
        ValueError: A line is longer than ``MOST_LINE_BYTES``.
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
    """Yield the non-empty lines before byte ``end``, the last one first, without line ends."""
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
    """Parse one JSON value.

    Raises:
        ValueError: The text is not valid JSON; with a message of one line.
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
    """Parse one JSON object.

    Raises:
        ValueError: The text is not a valid JSON object; with a message of one line.
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
