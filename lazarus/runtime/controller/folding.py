"""Folds the journal: replays its entries into one state, from which a restart continues."""

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
class JournalState:
    """What the entries of a journal add up to.

    Attributes:
        state: The controller's state after the entries.
        header: The first entry; None: the journal is empty.
        term: The newest "term" entry, written by each controller that starts; None: no such entry.
        port: Port that the first controller listened on; 0: none has started.
        end: The "end" entry; None: the run has not ended.
    """

    state: Control
    header: Entry | None = None
    term: Entry | None = None
    port: int = 0
    end: Entry | None = None

    def after(self, entry: Entry) -> JournalState:
        """A copy with one more entry taken into account."""
        after = replace(self, state=replayed(self.state, entry))
        match entry["kind"]:
            case "header":
                return replace(after, header=entry)
            case "term":
                return replace(after, term=entry, port=after.port or int(entry["port"]))
            case "end":
                return replace(after, end=entry)
        return after

    def to_json(self, mark: Mark, *, known: Known) -> str:
        """As JSON, together with the record's position at the same moment.

        Args:
            mark: The position.
            known: Cache of the texts of unchanged parts of the state; updated by this call.
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
    def from_dict(cls, data: Mapping[str, Any], config: ControlConfig) -> JournalState:
        """The inverse of ``to_json``, given the parsed JSON."""
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

    Attributes:
        folder: The journal's folder.
        folded: The newest undamaged folded state, or an empty one.
        number: Number of the last entry in the folded state; 0: there is no folded state.
        mark: The record's position when the state was folded; None: there is no folded state.
    """

    folder: Path
    folded: JournalState
    number: int = 0
    mark: Mark | None = None

    def tail(self) -> Iterator[Entry]:
        """The entries after the folded state, read one by one.

        Raises:
            JournalError: An entry is damaged or missing.
        """
        return (entry for _, entry in journal_reader.entries_after(self.folder, self.number))

    def whole(self) -> JournalState:
        """What the whole journal adds up to: the folded state and the entries after it."""
        whole = self.folded
        for entry in self.tail():
            whole = whole.after(entry)
        return whole


def find_journal(folder: Path, config: ControlConfig) -> Found:
    """Read the newest folded state of the journal in ``folder``.

    Raises:
        JournalError: The state is damaged or of another format.
    """
    newest = journal_reader.newest_state(folder)
    if newest is None:
        return Found(folder=folder, folded=JournalState(state=blank_state(config)))
    number, data = newest
    path = str(journal_reader.state_path(folder, number))
    if data.get("format") != journal_reader.FORMAT:
        reason = f"is of format {data.get('format')!r}; this version reads {journal_reader.FORMAT}"
        raise JournalError(path=path, reason=reason)
    try:
        folded, mark = JournalState.from_dict(data, config), Mark.from_dict(data["record"])
    except (KeyError, TypeError, ValueError) as error:
        raise JournalError(path=path, reason=f"holds no state: {error}") from error
    return Found(folder=folder, folded=folded, number=number, mark=mark)


def mark_of_earlier_life(run_dir: Path, *, but: str) -> Mark | None:
    """The newest record position that the journals of earlier, resumed runs hold.

    Args:
        run_dir: The run's folder.
        but: Name of the current journal's folder, which is skipped.
    """
    lives = [item for item in run_dir.glob("journal*") if item.is_dir() and item.name != but]
    marks = []
    for folder in lives:
        try:
            newest = journal_reader.newest_state(folder)
            marks += [] if newest is None else [Mark.from_dict(newest[1]["record"])]
        except (JournalError, KeyError, TypeError, ValueError):
            continue  # without a mark the record is read from its start
    return max(marks, key=lambda mark: mark.num_bytes, default=None)


class Folding:
    """Collects new journal entries and replays them when the journal is folded.

    Args:
        folder: The journal's folder.
        so_far: What the journal adds up to so far.
    """

    def __init__(self, folder: Path, so_far: JournalState) -> None:
        self._so_far = so_far
        self._loads = LoadHistory(folder / journal_reader.LOADS)
        self._waiting: list[Entry] = []
        self._known: Known = {}
        self._resumed = False

    def note(self, entry: Entry) -> None:
        """Note an entry that was appended to the journal."""
        self._waiting.append(entry)
        self._resumed = self._resumed or entry["kind"] == "resume"

    @property
    def is_worth_it(self) -> bool:
        """Whether a "resume" entry came since the last fold, which is a reason to fold early."""
        return self._resumed

    def state(self, mark: Mark) -> str:
        """Replay the new entries and return the state for ``Journal.fold``.

        Also writes the expert loads of their commits to the journal's ``loads.bin``.
        """
        for entry in self._waiting:
            self._work_through(entry)
        self._waiting.clear()
        self._resumed = False
        self._loads.flush()
        return self._so_far.to_json(mark, known=self._known)

    def _work_through(self, entry: Entry) -> None:
        before = self._so_far.state
        for commit in entry.get("commits", ()):
            if not self._loads.wants(int(commit["step"])):
                continue
            lanes = np.frombuffer(vector_of(commit).lanes, dtype="<f8")
            self._loads.add(int(commit["step"]), counts_of(before, lanes))
        self._so_far = self._so_far.after(entry)
