"""Read a record into a bounded number of events, for figures, charts and reports.

A million committed steps as dictionaries take a gigabyte. Beyond a bound, neighbouring commits are
merged into one event: tokens and ``wall_s`` are summed, all other fields are those of the last
commit. ``lazarus.record.metrics`` computes the same values from the result as from the whole
record, because commits that matter one by one are never merged: those undone later, and those
around events that changed the set of nodes.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lazarus.record.events import Event, each_event

MOST_COMMITS = 20_000  # records with at most so many commits are not condensed
_KEPT_BESIDE = 16  # unmerged commits around events that matter; commits are written a little late
_UNREAD = frozenset({"ledger"})  # one for each step, and not used by any metric
_MATTERS = frozenset(
    {
        *("run_started", "run_resumed", "run_restarted", "rolled_back", "run_finished"),
        *("fault_injected", "node_lost", "node_left", "node_joined", "reconfigured"),
        *("quorum_lost", "quorum_regained"),
    }
)


def condensed_events(path: str | Path, *, most: int = MOST_COMMITS) -> list[Event]:
    """The events of a record, condensed if there are more than ``most`` commits.

    Args:
        path: The record's file, or the run's folder.
        most: About how many commits a condensed record has, not counting unmerged ones.

    Raises:
        RecordError: See ``each_event``.
    """
    commits, others = _Commits(), list[tuple[int, Event]]()
    whole: list[Event] = []
    for event in each_event(path):
        if event["event"] == "step_committed":
            commits.add(event)
        else:
            others.append((len(commits), event))
        if len(commits) <= most:
            whole.append(event)
        else:
            whole.clear()
            if event["event"] in _UNREAD:
                others.pop()
    if len(commits) <= most:
        return whole
    return list(_merged(commits, [o for o in others if o[1]["event"] not in _UNREAD], most=most))


class _Commits:
    """Commits stored as columns, 64 bytes per commit."""

    def __init__(self) -> None:
        self.step, self.tokens = array("q"), array("q")
        self.generation, self.num_nodes = array("q"), array("q")
        self.t, self.m = array("d"), array("d")
        self.loss, self.wall_s = array("d"), array("d")

    def __len__(self) -> int:
        return len(self.step)

    def add(self, event: Event) -> None:
        for name in ("step", "tokens", "generation", "num_nodes"):
            getattr(self, name).append(int(event[name]))
        self.t.append(float(event.get("t", 0.0)))
        self.m.append(float(event.get("m", np.nan)))
        self.wall_s.append(float(event["wall_s"]))
        self.loss.append(np.nan if event["loss"] is None else float(event["loss"]))

    def event(self, first: int, last: int) -> dict[str, Any]:
        """One event that merges the commits from ``first`` to ``last``, inclusive."""
        loss, m = self.loss[last], self.m[last]
        return {
            "t": self.t[last],
            **({} if np.isnan(m) else {"m": m}),
            "event": "step_committed",
            "generation": self.generation[last],
            "step": self.step[last],
            "loss": None if np.isnan(loss) else loss,
            "tokens": sum(self.tokens[first : last + 1]),
            "num_nodes": self.num_nodes[last],
            "wall_s": sum(self.wall_s[first : last + 1]),
        }


def _merged(
    commits: _Commits, others: Sequence[tuple[int, Event]], *, most: int
) -> Iterator[Event]:
    """Yield merged commits, with the other events at their original places.

    Args:
        commits: All commits of the record.
        others: The other events, each with the number of commits before it, ascending.
        most: About how many merged commits to yield.
    """
    alone = _alone(commits, others)
    longest = max(1, -(-2 * len(commits) // most))
    first, waiting = 0, iter([*others, (len(commits) + 1, {})])
    place, other = next(waiting)
    for last in range(len(commits)):
        while place <= first:
            yield other
            place, other = next(waiting)
        after = last + 1
        ends = after == len(commits) or alone[last] or alone[after] or after - first >= longest
        same = ends or (
            commits.generation[after] == commits.generation[last]
            and commits.num_nodes[after] == commits.num_nodes[last]
        )
        if ends or not same:
            yield commits.event(first, last)
            first = after
    while place <= len(commits):
        yield other
        place, other = next(waiting)


def _alone(commits: _Commits, others: Sequence[tuple[int, Event]]) -> Any:
    """bool [commits], True for commits that must not be merged."""
    steps = np.frombuffer(commits.step, dtype=np.int64)
    lowest_after = np.append(np.minimum.accumulate(steps[::-1])[::-1][1:], np.iinfo(np.int64).max)
    alone = steps >= lowest_after  # undone: the step was committed again later
    for place, event in others:
        if event["event"] in _MATTERS:
            alone[max(0, place - _KEPT_BESIDE) : place + _KEPT_BESIDE] = True
    return alone
