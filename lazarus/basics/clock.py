"""The monotonic clock, used for all decisions, and the wall clock, shown to people.

A wall clock may jump (NTP, migration, a person), so only the times of day in a record use it.
Monotonic seconds start again when the machine boots.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def now_s() -> float:
    """Monotonic seconds, for deadlines, ages and durations."""
    return time.monotonic()


def wall_s(at_s: float) -> float:
    """Convert a monotonic moment to unix seconds, by the present setting of the wall clock."""
    return time.time() - (time.monotonic() - at_s)


def boot_id() -> str:
    """Id of this machine's boot, since which monotonic seconds count; empty if unknown."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunClock:
    """The clock of a run's record: ``t``, the time of day, and ``m``, seconds of the run's life.

    ``m`` continues where an earlier life of the run, or an earlier controller, ended.

    Args:
        zero_s: The monotonic moment at which ``m`` was 0.
        began_m: ``m`` at the beginning of this life of the run.
    """

    zero_s: float
    began_m: float = 0.0

    @classmethod
    def going_on(cls, *, since: Mapping[str, Any] | None, last_m: float) -> RunClock:
        """Make the clock of a starting controller.

        Args:
            since: The clock that an earlier controller of this life journaled (``noted``); or None.
            last_m: ``m`` of the newest line in the record; later lines never have a smaller one.
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
        """The clock as a journal entry, to be passed to ``going_on`` by the next controller."""
        return {"boot": boot_id(), "zero_s": self.zero_s, "began_m": self.began_m}

    def life_s(self, at_s: float) -> float:
        """Seconds from the start of this life of the run to a monotonic moment; at least 0."""
        return max(0.0, self.stamp(at_s)["m"] - self.began_m)

    def stamp(self, at_s: float) -> dict[str, float]:
        """``t`` and ``m`` of a monotonic moment. A moment in the future is replaced by now."""
        at_s = min(at_s, now_s())
        return {"t": wall_s(at_s), "m": round(max(0.0, at_s - self.zero_s), 6)}
