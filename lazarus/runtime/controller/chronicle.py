"""What a controller writes down: its journal, for its successor, and the record, for everybody."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from lazarus.basics.clock import RunClock
from lazarus.control.ports import Publish
from lazarus.control.restart.replay import missing_commits
from lazarus.record.events import FILE_NAME
from lazarus.record.journal_reader import FORMAT
from lazarus.runtime.controller.controller_end import recording
from lazarus.runtime.controller.folding import Folding, find_journal, mark_of_earlier_life
from lazarus.runtime.controller.journal import Journal
from lazarus.runtime.controller.record_log import RecordLog
from lazarus.runtime.spec import ControllerSpec

_FIGURES = ("goodput_tokens_per_s", "ettr", "plt")


class Chronicle:
    """Journal, record and clock of one controller, from where an earlier one left them.

    Attributes:
        told: What the journal told when it was opened.

    Raises:
        JournalError, RecordError: What the earlier one left cannot be taken for true.
    """

    def __init__(self, spec: ControllerSpec) -> None:
        self._spec = spec
        folder = spec.run_dir / spec.journal
        self._found = find_journal(folder, spec.config)
        self.told = self._found.told()
        self._journal, self._folding = Journal(folder), Folding(folder, self.told)
        mark = self._found.mark or mark_of_earlier_life(spec.run_dir, but=spec.journal)
        goes_on = self.told.header is not None
        self._record = RecordLog(spec.run_dir / FILE_NAME, since=mark, goes_on=goes_on)
        self._clock = RunClock.going_on(since=self.told.term, last_m=self._record.last_m)

    def unsaid(self) -> Iterator[Publish]:
        """Commits that the earlier one journaled and did not get to say."""
        if self.told.state.resumed:
            base = self._found.folded.state
            yield from missing_commits(self._found.tail(), base, said=self._record.said)
        self._record.forget_said()

    def begin(self, *, term: int, port: int) -> None:
        """From now on this controller rules."""
        if self.told.header is None:
            self.note({"kind": "header", "run": self._spec.config.run_id, "format": FORMAT})
        who = {"term": term, "port": port, "pid": os.getpid()}
        self.note({"kind": "term", **who, **self._clock.noted()})

    def note(self, entry: Mapping[str, Any]) -> None:
        """Append to the journal.

        Raises:
            UnrecordedError, JournalConflictError: It is not there; this controller must end.
        """
        with recording(self._spec.run_dir):
            self._journal.append(entry)
        self._folding.note(entry)

    def tidy(self) -> None:
        """Between two events: fold the journal where that is due."""
        if self._journal.is_long or self._folding.is_worth_it:
            self.fold()

    def fold(self) -> None:
        """Let the journal's next reader begin here. The record has what is journaled so far.

        Where there is no room for that the journal just stays long.
        """
        try:
            self._journal.fold(self._folding.state(self._record.mark()))
        except OSError as problem:
            self._journal.put_off()
            print(f"the journal was not folded: {problem}", file=sys.stderr, flush=True)

    def event_of(self, command: Publish) -> dict[str, Any]:
        """What the record will say."""
        event = {**self._clock.stamp(command.t), "event": command.event, **command.fields}
        if command.event == "run_finished":
            event["wall_s"] = self._clock.life_s(command.t)
        return self._record.completed(event)

    def say(self, event: Mapping[str, Any]) -> None:
        """Write a line of the record.

        Raises:
            UnrecordedError: It is not there.
        """
        with recording(self._spec.run_dir):
            self._record.append(event)

    @property
    def last_event(self) -> str:
        """Name of the newest line's event."""
        return self._record.last_event

    def figures(self) -> dict[str, Any]:
        """What the run came to, as the record's end says."""
        return {name: self._record.finished.get(name, 0.0) for name in _FIGURES}

    def close(self) -> None:
        self._record.close()
