"""Whether and when a controller that died is started again, and whether one that lives works."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from lazarus.basics.clock import now_s
from lazarus.basics.threads import OnDeath, spawn

MAX_DEATHS = 8  # in a row, without a life that went well between them
MAX_SAME = 3  # in a row with the same exception: it comes again however often it is tried


@dataclass(frozen=True, kw_only=True, slots=True)
class Again:
    """Start it once more, after ``pause_s``."""

    pause_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class GiveUp:
    """It will not live; ``reason`` says why that is clear."""

    reason: str


class Restarts:
    """Counts deaths in a row. A life that went well, or a death on purpose, forgives them all.

    Args:
        settled_s: A life that lasted for this long went well.
        pause_s: Pauses before the next life grow up to this.
    """

    def __init__(self, *, settled_s: float, pause_s: float) -> None:
        self._settled_s, self._longest_s = settled_s, pause_s
        self._causes: list[str] = []
        self._born_s: float | None = None  # None: not since the last death

    def born(self, at_s: float) -> None:
        """A life begins: it listens."""
        self._born_s = at_s

    def died(self, error: str, at_s: float, *, on_purpose: bool) -> Again | GiveUp:
        """What to do about a death.

        Args:
            error: The exception that it died of; empty: a signal, or nobody knows.
            on_purpose: The driver itself ended it, to inject a fault.
        """
        born_s, self._born_s = self._born_s, None
        if on_purpose or (born_s is not None and at_s - born_s >= self._settled_s):
            self._causes.clear()
        if on_purpose:
            return Again(pause_s=0.0)
        self._causes.append(error)
        newest = self._causes[-MAX_SAME:]
        if error and len(newest) == MAX_SAME and len(set(newest)) == 1:
            return GiveUp(reason=f"{MAX_SAME} times in a row in the same way")
        if len(self._causes) >= MAX_DEATHS:
            return GiveUp(reason=f"{MAX_DEATHS} times in a row")
        doublings = len(self._causes) - 2  # the first is tried again at once
        return Again(pause_s=0.0 if doublings < 0 else min(self._longest_s, 0.25 * 2**doublings))


class PulseWatch:
    """Watches the controller's loop from the driver: as long as it turns, it sends pulses.

    Args:
        limit_s: Silence after which a controller that is there counts as hung.
        on_hung: Called, in a thread of the watch, once for every silence.
    """

    def __init__(
        self,
        *,
        limit_s: float,
        on_hung: Callable[[float], None],
        on_death: OnDeath,
        clock: Callable[[], float] = now_s,
    ) -> None:
        self._limit_s, self._on_hung, self._clock = limit_s, on_hung, clock
        self._every_s = limit_s / 10
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._heard_s: float | None = None  # None: nothing to watch
        self._looked_s = clock()
        self._on_death = on_death

    def start(self) -> None:
        spawn("pulse", self._watch, on_death=self._on_death)

    def heard(self) -> None:
        """The loop turns; also said when a controller has just begun to listen."""
        with self._lock:
            self._heard_s = self._clock()

    def gone(self) -> None:
        """There is no controller: its silence means nothing."""
        with self._lock:
            self._heard_s = None

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(self._every_s):
            self.look()

    def look(self) -> None:
        """Whether it has been silent for too long, by now."""
        now = self._clock()
        with self._lock:
            slept_s = max(0.0, now - self._looked_s - 2 * self._every_s)
            self._looked_s = now
            if self._heard_s is None:
                return
            self._heard_s += slept_s  # while this process stood still it could not hear
            silent_s = now - self._heard_s
            if silent_s <= self._limit_s:
                return
            self._heard_s = None
        self._on_hung(silent_s)
