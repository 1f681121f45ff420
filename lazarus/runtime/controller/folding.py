"""What the journal has come to so far, kept beside it, so that it can be folded at any entry."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lazarus.control.cluster.state import Control, ControlConfig
from lazarus.control.commit.commits import counts_of
from lazarus.control.restart.folded import Known, folded_text, unfolded
from lazarus.control.restart.replay import blank_state, replayed, vector_of
from lazarus.errors import JournalError
from lazarus.record import journal_reader
from lazarus.record.load_history import LoadHistory
from lazarus.runtime.controller.record_log import Mark

Entry = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Told:
    """What a journal tells.

    Args:
        header: The first entry; None: nobody has journaled anything.
        term: The newest entry of a controller that began; None before the first.
        port: Where the first one listened.
        end: How the run was ended, if it was.
    """

    state: Control
    header: Entry | None = None
    term: Entry | None = None
    port: int = 0
    end: Entry | None = None

    def after(self, entry: Entry) -> Told:
        """The same with one more entry."""
        told = replace(self, state=replayed(self.state, entry))
        match entry["kind"]:
            case "header":
                return replace(told, header=entry)
            case "term":
                return replace(told, term=entry, port=told.port or int(entry["port"]))
            case "end":
                return replace(told, end=entry)
        return told

    def to_json(self, mark: Mark, *, known: Known) -> str:
        """As text, with how far the record was at the same moment.

        Args:
            known: Texts of parts of the state that have not changed since; kept up to date.
        """
        rest = {
            "format": journal_reader.FORMAT,
            "header": self.header,
            "term": self.term,
            "port": self.port,
            "end": self.end,
            "record": mark.to_dict(),
        }
        text = json.dumps(rest, separators=(",", ":"))
        return f'{text[:-1]},"control":{folded_text(self.state, known=known)}}}'

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], config: ControlConfig) -> Told:
        """The inverse of ``to_dict``."""
        return cls(
            state=unfolded(data["control"], config),
            header=data["header"],
            term=data["term"],
            port=int(data["port"]),
            end=data["end"],
        )


@dataclass(frozen=True, kw_only=True)
class Found:
    """A journal as a controller finds it when it starts.

    Args:
        folder: Where it is.
        folded: What its newest sound state tells.
        number: The entry behind which that was folded; 0: there is none.
        mark: How far the record was then; None: there is none.
    """

    folder: Path
    folded: Told
    number: int = 0
    mark: Mark | None = None

    def tail(self) -> Iterator[Entry]:
        """The entries behind the folded state, read one by one.

        Raises:
            JournalError: One is damaged, or missing.
        """
        return (entry for _, entry in journal_reader.entries_after(self.folder, self.number))

    def told(self) -> Told:
        """What all of it tells."""
        told = self.folded
        for entry in self.tail():
            told = told.after(entry)
        return told


def find_journal(folder: Path, config: ControlConfig) -> Found:
    """Read the newest folded state.

    Raises:
        JournalError: It cannot be taken for true.
    """
    newest = journal_reader.newest_state(folder)
    if newest is None:
        return Found(folder=folder, folded=Told(state=blank_state(config)))
    number, data = newest
    path = str(journal_reader.state_path(folder, number))
    if data.get("format") != journal_reader.FORMAT:
        reason = f"is of format {data.get('format')!r}; this version reads {journal_reader.FORMAT}"
        raise JournalError(path=path, reason=reason)
    try:
        told, mark = Told.from_dict(data, config), Mark.from_dict(data["record"])
    except (KeyError, TypeError, ValueError) as error:
        raise JournalError(path=path, reason=f"holds no state: {error}") from error
    return Found(folder=folder, folded=told, number=number, mark=mark)


def mark_of_earlier_life(run_dir: Path, *, but: str) -> Mark | None:
    """How far the record was when another life of the run last folded its journal."""
    lives = [item for item in run_dir.glob("journal*") if item.is_dir() and item.name != but]
    marks = []
    for folder in lives:
        try:
            newest = journal_reader.newest_state(folder)
            marks += [] if newest is None else [Mark.from_dict(newest[1]["record"])]
        except (JournalError, KeyError, TypeError, ValueError):
            continue  # the record itself is read instead
    return max(marks, key=lambda mark: mark.num_bytes, default=None)


class Folding:
    """Follows the entries as they are journaled; works through them when nobody waits."""

    def __init__(self, folder: Path, told: Told) -> None:
        self._told = told
        self._loads = LoadHistory(folder / journal_reader.LOADS)
        self._waiting: list[Entry] = []
        self._known: Known = {}
        self._resumed = False

    def note(self, entry: Entry) -> None:
        """One more entry is in the journal."""
        self._waiting.append(entry)
        self._resumed = self._resumed or entry["kind"] == "resume"

    @property
    def is_worth_it(self) -> bool:
        """Whether the newest entries are larger, or matter more, than others."""
        return self._resumed

    def state(self, mark: Mark) -> str:
        """What ``Journal.fold`` is given; the loads so far are written as well."""
        for entry in self._waiting:
            self._work_through(entry)
        self._waiting.clear()
        self._resumed = False
        self._loads.flush()
        return self._told.to_json(mark, known=self._known)

    def _work_through(self, entry: Entry) -> None:
        before = self._told.state
        for commit in entry.get("commits", ()):
            if not self._loads.wants(int(commit["step"])):
                continue
            lanes = np.frombuffer(vector_of(commit).lanes, dtype="<f8")
            self._loads.add(int(commit["step"]), counts_of(before, lanes))
        self._told = self._told.after(entry)
