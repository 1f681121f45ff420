"""The stretches of steps behind a run, so that going back undoes what those steps really were."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True, slots=True)
class Stretch:
    """Alike steps: those after step ``first`` up to ``last``."""

    first: int
    last: int
    step_s: float
    tokens: float  # of one step


class Past:
    """Stretches in order, each from where the one before it ends."""

    def __init__(self) -> None:
        self.stretches: list[Stretch] = []

    def went_on(self, stretch: Stretch) -> None:
        """Steps were committed."""
        self.stretches.append(stretch)

    def back_to(self, step: int) -> list[Stretch]:
        """Everything after ``step`` is undone; what that was."""
        undone: list[Stretch] = []
        while self.stretches and self.stretches[-1].last > step:
            whole = self.stretches.pop()
            kept = max(step, whole.first)
            undone.append(replace(whole, first=kept))
            if kept > whole.first:
                self.stretches.append(replace(whole, last=kept))
        return undone
