"""Overwrite damaged lines of a record with blanks, so that readers can read all other lines.

The other lines keep their offsets and line numbers. The damaged bytes are saved in
``events.damaged`` beside the record: one JSON object per line, with offset and base64 bytes.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lazarus.basics.careful import lines_of, open_regular
from lazarus.record.events import decode_bytes

DAMAGED_NAME = "events.damaged"


@dataclass(frozen=True, kw_only=True, slots=True)
class DamagedLine:
    """A complete line that is not a valid event: its byte offset ``at`` and its bytes."""

    path: Path
    at: int
    data: bytes
    reason: str

    def __str__(self) -> str:
        return (
            f"{self.path}: the line at byte {self.at:,} was damaged ({self.reason}); it is left "
            f"out, its bytes are in {DAMAGED_NAME}"
        )


def blank_damaged(path: Path, *, since: int = 0) -> tuple[DamagedLine, ...]:
    """Overwrite damaged lines with blanks. Only the process that writes the record may call this.

    Args:
        path: The record's file.
        since: Byte offset at which a line begins; earlier lines are not checked.

    Returns:
        The damaged lines.

    Raises:
        OSError: The file cannot be read or written.
        ValueError: A line is longer than any event can be.
    """
    found = tuple(_damaged(path, since))
    if not found:
        return ()
    with path.with_name(DAMAGED_NAME).open("ab") as kept:
        for line in found:
            held = {"at": line.at, "bytes": base64.b64encode(line.data).decode("ascii")}
            kept.write(json.dumps(held).encode() + b"\n")
    with path.open("r+b") as file:
        for line in found:
            os.pwrite(file.fileno(), b" " * len(line.data), line.at)
        os.fsync(file.fileno())
    return found


def _damaged(path: Path, since: int) -> Iterator[DamagedLine]:
    at = since
    with open_regular(path) as file:
        for end, data in lines_of(file, at=since):
            try:
                if data.strip():
                    decode_bytes(data)
            except ValueError as problem:
                yield DamagedLine(path=path, at=at, data=data, reason=str(problem)[:200])
            at = end
