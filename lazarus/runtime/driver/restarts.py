"""Decides whether and when a dead controller is restarted, and detects a hung controller."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from lazarus.basics.clock import now_s
from lazarus.basics.threads import OnDeath, spawn

MAX_DEATHS = 8  # in a row, without a controller in between that lived for ``settled_s``
MAX_SAME = 3  # in a row with the same exception: another restart would not help


@dataclass(frozen=True, kw_only=True, slots=True)
class Again:
    """Restart the controller after ``pause_s``."""

    pause_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class GiveUp:
    """Do not restart the controller; ``reason`` says how often it died."""

    reason: str


class Restarts:
    """Counts the controller's deaths in a row and decides what follows each.

    The count starts anew when a controller lived for ``settled_s``, or was killed on purpose.

    Args:
        settled_s: Lifetime after which earlier deaths no longer count.
        pause_s: Longest pause before a restart; pauses double up to this.
    """

    def __init__(self, *, settled_s: float, pause_s: float) -> None:
        self._settled_s, self._longest_s = settled_s, pause_s
        self._causes: list[str] = []
        self._born_s: float | None = None  # None: no controller has started since the last death

    def born(self, at_s: float) -> None:
        """Note that a controller listens since ``at_s``."""
        self._born_s = at_s

    def died(self, error: str, at_s: float, *, on_purpose: bool) -> Again | GiveUp:
        """Decide what to do about a death.

        Args:
            error: Message of the exception that ended the controller; empty: a signal, or unknown.
            at_s: When it died.
            on_purpose: The driver killed the controller to inject a fault.
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
        doublings = len(self._causes) - 2  # after the first death the restart is immediate
        return Again(pause_s=0.0 if doublings < 0 else min(self._longest_s, 0.25 * 2**doublings))


class PulseWatch:
    """Detects a hung controller: its event loop sends pulses while it works.

    Args:
        limit_s: Time without a pulse after which a running controller counts as hung.
        on_hung: Called with the seconds of silence, in the watch's thread, once per silence.
        on_death: Called if the watch's thread dies.
        clock: Monotonic time in seconds.
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
        self._heard_s: float | None = None  # time of the last pulse; None: no controller runs
        self._looked_s = clock()
        self._on_death = on_death

    def start(self) -> None:
        spawn("pulse", self._watch, on_death=self._on_death)

    def heard(self) -> None:
        """Note a pulse, or that a controller has just begun to listen."""
        with self._lock:
            self._heard_s = self._clock()

    def gone(self) -> None:
        """Stop expecting pulses, because no controller runs."""
        with self._lock:
            self._heard_s = None

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(self._every_s):
            self.look()

    def look(self) -> None:
        """Call ``on_hung`` if the controller has been silent for too long."""
        now = self._clock()
        with self._lock:
            slept_s = max(0.0, now - self._looked_s - 2 * self._every_s)
            self._looked_s = now
            if self._heard_s is None:
                return
            self._heard_s += slept_s  # a suspended driver received no pulses meanwhile
            silent_s = now - self._heard_s
            if silent_s <= self._limit_s:
                return
            self._heard_s = None
        self._on_hung(silent_s)
