"""Goodput, ETTR and PLT of a running run, computed incrementally in constant memory. PURE.

``lazarus.record.metrics`` computes the same values from a list of all events.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from lazarus.record.events import Event, moment


@dataclass(kw_only=True, slots=True)
class RunTotals:
    """Sums over all committed steps that were not undone, from which the metrics follow."""

    tokens: int = 0
    productive_s: float = 0.0
    last_step: int = 0  # the highest step that was not undone
    commits: int = 0  # commits that were not undone
    lost_copies: float = 0.0
    top_k: int = 1
    num_layers: int = 1
    earlier_s: float = 0.0  # wall seconds of earlier lives
    began_s: float | None = None  # first moment of this life; ``last_s`` is the last one
    last_s: float = 0.0
    last_event: str = ""

    def add(self, event: Event, *, before: Callable[[], Iterable[Event]]) -> None:
        """Add the next event of the record.

        Args:
            event: The event.
            before: Returns the record's earlier events, newest first. Called only if the step was
                committed before; read only as far back as needed to undo that commit.
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
        """Subtract the commits of ``step`` and later steps; only the last commit of each counts."""
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
        """Seconds from the first to the last event of each life, summed over all lives."""
        began = self.last_s if self.began_s is None else self.began_s
        return self.earlier_s + max(0.0, self.last_s - began)

    def figures(self) -> dict[str, float]:
        """Goodput, ETTR and PLT of the whole run, as fields of ``run_finished``."""
        seconds = self.wall_s
        copies = self.tokens * self.top_k * self.num_layers
        productive_s = max(0.0, self.productive_s)
        return {
            "goodput_tokens_per_s": self.tokens / seconds if seconds > 0 else 0.0,
            "ettr": min(1.0, productive_s / seconds) if seconds > 0 else 0.0,
            "plt": self.lost_copies / copies if copies else 0.0,
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RunTotals:
        """The inverse of ``to_dict``; unknown keys are ignored, missing ones get their default."""
        return cls(**{f.name: data[f.name] for f in fields(cls) if f.name in data})
