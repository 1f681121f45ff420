"""The committed steps of a simulated run, kept so that a rollback undoes their exact totals."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True, slots=True)
class Stretch:
    """Consecutive steps of equal duration and batch: ``first`` + 1 to ``last``."""

    first: int
    last: int
    step_s: float
    tokens: float  # of one step


class Past:
    """Consecutive stretches of committed steps."""

    def __init__(self) -> None:
        self.stretches: list[Stretch] = []

    def went_on(self, stretch: Stretch) -> None:
        """Append a stretch of committed steps."""
        self.stretches.append(stretch)

    def back_to(self, step: int) -> list[Stretch]:
        """Undo all steps after ``step`` and return them as stretches, the latest first."""
        undone: list[Stretch] = []
        while self.stretches and self.stretches[-1].last > step:
            whole = self.stretches.pop()
            kept = max(step, whole.first)
            undone.append(replace(whole, first=kept))
            if kept > whole.first:
                self.stretches.append(replace(whole, last=kept))
        return undone
