"""What a controller writes: the journal, for the next controller, and the record, for users."""

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
    """Journal, record and clock of a controller; they continue those of an earlier controller.

    Attributes:
        journal_state: What the journal added up to when it was opened.

    Raises:
        JournalError, RecordError: The existing journal or record is damaged.
    """

    def __init__(self, spec: ControllerSpec) -> None:
        self._spec = spec
        folder = spec.run_dir / spec.journal
        self._found = find_journal(folder, spec.config)
        self.journal_state = self._found.whole()
        self._journal, self._folding = Journal(folder), Folding(folder, self.journal_state)
        mark = self._found.mark or mark_of_earlier_life(spec.run_dir, but=spec.journal)
        goes_on = self.journal_state.header is not None
        self._record = RecordLog(spec.run_dir / FILE_NAME, since=mark, goes_on=goes_on)
        self._clock = RunClock.going_on(since=self.journal_state.term, last_m=self._record.last_m)

    def unsaid(self) -> Iterator[Publish]:
        """Events of commits that an earlier controller journaled but did not record."""
        if self.journal_state.state.resumed:
            base = self._found.folded.state
            yield from missing_commits(self._found.tail(), base, said=self._record.said)
        self._record.forget_said()

    def begin(self, *, term: int, port: int) -> None:
        """Journal that this controller takes over, with its term and port."""
        if self.journal_state.header is None:
            self.note({"kind": "header", "run": self._spec.config.run_id, "format": FORMAT})
        who = {"term": term, "port": port, "pid": os.getpid()}
        self.note({"kind": "term", **who, **self._clock.noted()})

    def note(self, entry: Mapping[str, Any]) -> None:
        """Append to the journal.

        Raises:
            UnrecordedError, JournalConflictError: The entry was not written; this controller must
                end.
        """
        with recording(self._spec.run_dir):
            self._journal.append(entry)
        self._folding.note(entry)

    def tidy(self) -> None:
        """Fold the journal if that is due; called between two events."""
        if self._journal.is_long or self._folding.is_worth_it:
            self.fold()

    def fold(self) -> None:
        """Write a folded state, from which the next controller starts.

        Call this only when the record has the events of all entries so far. If the state cannot be
        written, the journal stays long, with a warning on standard error.
        """
        try:
            self._journal.fold(self._folding.state(self._record.mark()))
        except OSError as problem:
            self._journal.put_off()
            print(f"the journal was not folded: {problem}", file=sys.stderr, flush=True)

    def event_of(self, command: Publish) -> dict[str, Any]:
        """The event of a command, with its times, as the record will hold it."""
        event = {**self._clock.stamp(command.t), "event": command.event, **command.fields}
        if command.event == "run_finished":
            event["wall_s"] = self._clock.life_s(command.t)
        return self._record.completed(event)

    def say(self, event: Mapping[str, Any]) -> None:
        """Append an event from ``event_of`` to the record.

        Raises:
            UnrecordedError: The event was not written.
        """
        with recording(self._spec.run_dir):
            self._record.append(event)

    @property
    def last_event(self) -> str:
        """Name of the record's newest event; empty: no event."""
        return self._record.last_event

    def figures(self) -> dict[str, Any]:
        """Goodput, ETTR and PLT of the run, from ``run_finished``; 0.0 before that event."""
        return {name: self._record.finished.get(name, 0.0) for name in _FIGURES}

    def close(self) -> None:
        self._record.close()
