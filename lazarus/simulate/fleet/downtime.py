"""Since when a simulated fleet does not train, and why."""

from __future__ import annotations

from lazarus.simulate.rows import Tally

RECOVERY, PLANNED = "recovery", "planned change"
WAITING, RESTART = "waiting for nodes", "restart"


class Downtime:
    """Measures the time from the end of training to the next commit, and bills it to a cause.

    Args:
        tally: Receives the seconds by cause, and the length of each recovery.
    """

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._since_s: float | None = None
        self._why = ""

    def begins(self, why: str, *, now_s: float) -> None:
        """Training has stopped; while it stands still, only the first call counts.

        A loss ends a planned change: what comes after it is recovery.
        """
        if self._since_s is not None and (self._why, why) == (PLANNED, RECOVERY):
            self._tally.stall(self._why, now_s - self._since_s)
            self._since_s = None
        if self._since_s is None:
            self._since_s, self._why = now_s, why

    def turns_into(self, why: str) -> None:
        """Bill the whole time, past time too, to another cause."""
        self._why = why

    def ends(self, *, now_s: float) -> None:
        """The first step after the change is committed."""
        if self._since_s is None:
            return
        if self._why != PLANNED:
            self._tally.recovery_s.append(now_s - self._since_s)
        self.run_ends(now_s=now_s)

    def run_ends(self, *, now_s: float) -> None:
        """Bill the time so far; a recovery that never ended has no length."""
        if self._since_s is not None:
            self._tally.stall(self._why, now_s - self._since_s)
            self._since_s = None
