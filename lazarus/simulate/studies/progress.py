"""Progress messages of a long simulation."""

from __future__ import annotations

import time
from collections.abc import Callable

EVERY_S = 2.0


class Progress:
    """Reports progress as lines of text, at most one per ``every_s`` seconds.

    Args:
        total: Number of runs.
        say: Called with each line.
        every_s: Least time between two lines, in seconds.
    """

    def __init__(self, total: int, *, say: Callable[[str], None], every_s: float = EVERY_S) -> None:
        self._total, self._say, self._every_s = total, say, every_s
        self._number, self._name, self._hours = 0, "", 0.0
        self._said_s = time.monotonic()

    def begins(self, name: str, *, horizon_s: float) -> None:
        """Note that the next run starts."""
        self._number, self._name, self._hours = self._number + 1, name, horizon_s / 3600

    def at(self, now_s: float) -> None:
        """Note that the virtual clock of the present run is at ``now_s``."""
        hour = min(now_s / 3600, self._hours)
        self._tell(
            f"run {self._number}/{self._total}, {self._name}: hour {hour:.1f} of {self._hours:.1f}"
        )

    def ended(self) -> None:
        """Note that the present run has ended."""
        self._tell(f"{self._number}/{self._total} runs, last {self._name}")

    def _tell(self, line: str) -> None:
        now_s = time.monotonic()
        if now_s - self._said_s > self._every_s:
            self._said_s = now_s
            self._say(line)
