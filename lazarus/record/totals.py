"""Goodput, ETTR and PLT of a run that goes on, in memory that does not grow with its steps.

``lazarus.record.metrics`` has the same figures as functions of all events; both agree. PURE.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from lazarus.record.events import Event, moment


@dataclass(kw_only=True, slots=True)
class RunTotals:
    """Sums over the steps that count, and what else the figures need."""

    tokens: int = 0
    productive_s: float = 0.0
    last_step: int = 0  # the highest that counts
    commits: int = 0  # that count
    lost_copies: float = 0.0
    top_k: int = 1
    num_layers: int = 1
    earlier_s: float = 0.0  # of lives that are over
    began_s: float | None = None  # first and last moment of this life
    last_s: float = 0.0
    last_event: str = ""

    def add(self, event: Event, *, before: Callable[[], Iterable[Event]]) -> None:
        """One more event of the record.

        Args:
            before: The record's events before this one, the last one first; only asked where the
                step was committed before, and no further back than it was.
        """
        at_s, name = moment(event), str(event["event"])
        if self.began_s is None or name == "run_started":
            if self.began_s is not None:
                self.earlier_s += max(0.0, self.last_s - self.began_s)
            self.began_s = at_s
        self.last_s, self.last_event = at_s, name
        match name:
            case "run_started":
                self.top_k = int(event.get("top_k", self.top_k))
                self.num_layers = int(event.get("num_layers", self.num_layers))
            case "expert_restored":
                self.lost_copies += float(event["lost_copies"])
            case "step_committed":
                step = int(event["step"])
                if self.commits and step <= self.last_step:
                    self._undo(step, before())
                self._count(event, +1)
                self.last_step = step

    def _undo(self, step: int, before: Iterable[Event]) -> None:
        """Commits from ``step`` on are void. Of a step that came several times the last counts."""
        lowest: float = float("inf")
        for event in before:
            if not self.commits:
                break
            if event["event"] != "step_committed" or int(event["step"]) >= lowest:
                continue
            lowest = int(event["step"])
            if lowest < step:
                return
            self._count(event, -1)

    def _count(self, event: Event, sign: int) -> None:
        self.commits += sign
        self.tokens += sign * int(event["tokens"])
        self.productive_s += sign * float(event["wall_s"])

    @property
    def wall_s(self) -> float:
        """Seconds from start to end, summed over lives."""
        began = self.last_s if self.began_s is None else self.began_s
        return self.earlier_s + max(0.0, self.last_s - began)

    def figures(self) -> dict[str, float]:
        """What ``run_finished`` says of the whole run."""
        seconds = self.wall_s
        copies = self.tokens * self.top_k * self.num_layers
        productive_s = max(0.0, self.productive_s)
        return {
            "goodput_tokens_per_s": self.tokens / seconds if seconds > 0 else 0.0,
            "ettr": min(1.0, productive_s / seconds) if seconds > 0 else 0.0,
            "plt": self.lost_copies / copies if copies else 0.0,
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RunTotals:
        """The inverse of ``to_dict``; what is not known is left out."""
        return cls(**{f.name: data[f.name] for f in fields(cls) if f.name in data})
