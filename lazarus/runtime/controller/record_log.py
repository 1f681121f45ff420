"""Appends to a run's record, events.jsonl, without holding it in memory."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lazarus.basics.careful import lines_backwards, lines_of, open_regular
from lazarus.errors import RecordError
from lazarus.record.events import decode_bytes
from lazarus.record.record_repair import blank_damaged
from lazarus.record.totals import RunTotals

_SAID = frozenset({"step_committed", "ledger", "ledger_mismatch"})


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A position in the record, and the run's totals up to there.

    Attributes:
        num_bytes: Length of the record up to the position.
        totals: Totals of the events before it.
    """

    num_bytes: int = 0
    totals: RunTotals = field(default_factory=RunTotals)

    def to_dict(self) -> dict[str, Any]:
        """As plain data that JSON can hold."""
        return {"num_bytes": self.num_bytes, "totals": self.totals.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Mark:
        """The inverse of ``to_dict``."""
        return cls(
            num_bytes=int(data["num_bytes"]), totals=RunTotals.from_dict(dict(data["totals"]))
        )


class RecordLog:
    """The record of a run, opened by its one writer: one JSON object a line, written at once.

    Opening cuts off a half-written last line and overwrites damaged lines with blanks, with a
    warning on standard error for each damaged line.

    Args:
        path: The file.
        since: Position up to which the record is known; only the rest is read. None: read all.
        goes_on: An earlier controller of the same run has written to the record: remember its
            events, see ``said``.

    Raises:
        RecordError: The existing record cannot be read.
    """

    def __init__(self, path: Path, *, since: Mark | None = None, goes_on: bool = False) -> None:
        self._path = path
        self._goes_on = goes_on
        self.finished: Mapping[str, Any] = {}  # the newest `run_finished` event
        self._said: set[tuple[str, int, int]] = set()
        self._out = path.open("ab", buffering=0)
        self._num_bytes = _without_half_a_line(path)
        fits = since is not None and _ends_a_line(path, since.num_bytes, self._num_bytes)
        self._since = since if since is not None and fits else Mark()
        for damaged in blank_damaged(path, since=self._since.num_bytes):
            print(f"warning: {damaged}", file=sys.stderr, flush=True)
        self._totals = RunTotals.from_dict(self._since.totals.to_dict())
        self._read_on()

    def _read_on(self) -> None:
        """Read the record after the mark: totals, and which commits the newest run recorded."""
        at, line = self._since.num_bytes, 0
        try:
            with open_regular(self._path) as file:
                for end, data in lines_of(file, at=at):
                    line += 1
                    if data.strip():
                        self._learn(decode_bytes(data), at=at)
                    at = end
        except OSError as error:
            raise RecordError(path=str(self._path), line=0, reason=str(error.strerror)) from error
        except ValueError as error:
            line += self._lines_before()
            raise RecordError(path=str(self._path), line=line, reason=str(error)) from error

    def _lines_before(self) -> int:
        with open_regular(self._path) as file:
            return sum(end <= self._since.num_bytes for end, _ in lines_of(file))

    def _learn(self, event: Mapping[str, Any], *, at: int) -> None:
        name = event["event"]
        if name == "run_started":
            self._said.clear()
        elif name == "run_finished":
            self.finished = event
        elif name in _SAID and self._goes_on:
            self._said.add((name, int(event["generation"]), int(event["step"])))
        self._totals.add(event, before=lambda: self._backwards(at))

    def _backwards(self, end: int) -> Iterator[dict[str, Any]]:
        with open_regular(self._path) as file:
            for line in lines_backwards(file, end=end):
                if line.strip():  # skip blanked lines
                    yield decode_bytes(line)

    @property
    def last_m(self) -> float:
        """Time of the newest line in seconds that the run has been alive; 0: no line."""
        return self._totals.last_s

    @property
    def last_event(self) -> str:
        """Name of the newest line's event; empty: no line."""
        return self._totals.last_event

    @property
    def totals(self) -> RunTotals:
        """Totals of all events in the record."""
        return self._totals

    def mark(self) -> Mark:
        """The end of the record as a mark, to be given to a later writer as ``since``."""
        return Mark(num_bytes=self._num_bytes, totals=RunTotals.from_dict(self._totals.to_dict()))

    def said(self, name: str, generation: int, step: int) -> bool:
        """Whether an earlier controller of this run wrote this event after the mark."""
        return (name, generation, step) in self._said

    def forget_said(self) -> None:
        """Free the memory of ``said``, once its missing events are written."""
        self._said.clear()

    def completed(self, event: Mapping[str, Any]) -> dict[str, Any]:
        """An event as the record will hold it: ``run_finished`` gets the run's figures."""
        if event["event"] == "run_finished":
            after = self.mark().totals
            after.add(event, before=lambda: self._backwards(self._num_bytes))
            event = self.finished = finite({**after.figures(), **event})
        return dict(finite(event))

    def append(self, event: Mapping[str, Any]) -> None:
        """Write an event from ``completed``, whole or not at all.

        The totals include the event even if the write fails.

        Raises:
            OSError: The event was not written.
        """
        self._totals.add(event, before=lambda: self._backwards(self._num_bytes))
        data = (line_of(event) + "\n").encode()
        left = memoryview(data)
        try:
            while left:
                left = left[self._out.write(left) :]
        except OSError:
            os.truncate(self._out.fileno(), self._num_bytes)
            raise
        self._num_bytes += len(data)

    def close(self) -> None:
        self._out.close()


def line_of(event: Mapping[str, Any]) -> str:
    """An event as a line of the record, without the newline."""
    return json.dumps(event, separators=(",", ":"), allow_nan=False)


def finite(value: Any) -> Any:
    """Replace NaN and infinities by None, because JSON has no such numbers."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _without_half_a_line(path: Path) -> int:
    """Cut off a half-written last line. Returns the bytes that remain."""
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        if end == 0:
            return 0
        file.seek(end - 1)
        if file.read(1) == b"\n":
            return end
        end -= len(next(lines_backwards(file, end=end), b""))
        file.truncate(end)
        return end


def _ends_a_line(path: Path, num_bytes: int, size: int) -> bool:
    if num_bytes > size:
        return False
    with open_regular(path) as file:
        file.seek(max(0, num_bytes - 1))
        return num_bytes == 0 or file.read(1) == b"\n"
