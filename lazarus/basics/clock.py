"""Two clocks: decisions are made by the monotonic one; people read the other.

A wall clock is set back and forth (NTP, a machine that moves, a person); nothing but the times of
day in a record may follow it. Monotonic seconds start anew with the machine.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def now_s() -> float:
    """Monotonic seconds: every deadline, age and duration is a difference of two of these."""
    return time.monotonic()


def wall_s(at_s: float) -> float:
    """The time of day, in unix seconds, of a monotonic moment, as the wall clock now has it."""
    return time.time() - (time.monotonic() - at_s)


def boot_id() -> str:
    """What this machine's monotonic seconds count from; empty where the system does not say."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunClock:
    """Times of a run's record: ``t``, the time of day, and ``m``, seconds the run has been alive.

    ``m`` goes on where an earlier life of the run, or of its controller, left off.

    Args:
        zero_s: The monotonic moment at which ``m`` was 0.
        began_m: ``m`` at the beginning of this life of the run.
    """

    zero_s: float
    began_m: float = 0.0

    @classmethod
    def going_on(cls, *, since: Mapping[str, Any] | None, last_m: float) -> RunClock:
        """The clock of a controller that starts.

        Args:
            since: Journal entry in which an earlier controller of this life noted its clock.
            last_m: Of the newest line of the record; no later line will have a smaller one.
        """
        now = now_s()
        if since is None:
            return cls(zero_s=now - last_m, began_m=last_m)
        zero_s, began_m = float(since["zero_s"]), float(since["began_m"])
        same_boot = since["boot"] == boot_id() != ""
        if same_boot and now - zero_s >= last_m:
            return cls(zero_s=zero_s, began_m=began_m)
        return cls(zero_s=now - last_m, began_m=began_m)

    def noted(self) -> dict[str, Any]:
        """For the journal; see ``going_on``."""
        return {"boot": boot_id(), "zero_s": self.zero_s, "began_m": self.began_m}

    def life_s(self, at_s: float) -> float:
        """Seconds that this life of the run has lasted at a moment."""
        return max(0.0, self.stamp(at_s)["m"] - self.began_m)

    def stamp(self, at_s: float) -> dict[str, float]:
        """``t`` and ``m`` of a moment. One of another machine's life, ahead of ours, is now."""
        at_s = min(at_s, now_s())
        return {"t": wall_s(at_s), "m": round(max(0.0, at_s - self.zero_s), 6)}
