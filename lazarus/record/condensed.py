"""A record of any length as a list of events of bounded length: for figures, charts and reports.

A million committed steps as dictionaries take a gigabyte. Beyond a bound, neighbouring commits
become one event that stands for all of them: tokens and seconds of the step add up, everything else
is that of the last. ``lazarus.record.metrics`` gives the same figures of it as of the whole
record, since what figures look at one by one stays as it is: commits that do not count in the end,
and those before and behind anything that changed who takes part.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lazarus.record.events import Event, each_event

MOST_COMMITS = 20_000  # up to here nothing is condensed
_KEPT_BESIDE = 16  # commits before and behind what matters; commits are written a little late
_UNREAD = frozenset({"ledger"})  # as many as steps, and no figure asks for them
_MATTERS = frozenset(
    {
        *("run_started", "run_resumed", "run_restarted", "rolled_back", "run_finished"),
        *("fault_injected", "node_lost", "node_left", "node_joined", "reconfigured"),
        *("quorum_lost", "quorum_regained"),
    }
)


def condensed_events(path: str | Path, *, most: int = MOST_COMMITS) -> list[Event]:
    """The events of a record, the whole of them up to ``most`` commits.

    Args:
        path: The file, or the run's folder.
        most: About how many commits are left of a longer record, those beside losses apart.

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
    """Commits in columns, 64 bytes each."""

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
        """One event for the commits from ``first`` to ``last``."""
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
    """Groups of commits, and the other events where they were.

    Args:
        others: Each with the number of commits before it, ascending.
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
    """bool [commits]: which of them stay as they are."""
    steps = np.frombuffer(commits.step, dtype=np.int64)
    lowest_after = np.append(np.minimum.accumulate(steps[::-1])[::-1][1:], np.iinfo(np.int64).max)
    alone = steps >= lowest_after  # done again later: they do not count
    for place, event in others:
        if event["event"] in _MATTERS:
            alone[max(0, place - _KEPT_BESIDE) : place + _KEPT_BESIDE] = True
    return alone
