"""The learning-rate multiplier of each step, from the user's schedule."""

from __future__ import annotations

import math
from collections.abc import Callable

from lazarus.errors import UserMistakeError

Schedule = Callable[[int], float]


class Rates:
    """Calls the user's schedule and checks that it returns a finite number >= 0."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._last: tuple[int, float] | None = None

    def of(self, step: int) -> float:
        """The multiplier of ``step``. The schedule must be a pure function of the step.

        Raises:
            UserMistakeError: The schedule did not return a finite number >= 0.
        """
        if self._last is None or self._last[0] != step:
            self._last = (step, _checked(self._schedule(step), step))
        return self._last[1]


def _checked(answer: object, step: int) -> float:
    wanted = f"schedule({step}) must be a finite number >= 0"
    if isinstance(answer, str | bytes) or not hasattr(answer, "__float__"):
        raise UserMistakeError(f"{wanted}; it returned {type(answer).__name__}")
    rate = float(answer)
    if not math.isfinite(rate) or rate < 0:
        raise UserMistakeError(f"{wanted}; it returned {rate}")
    return rate
