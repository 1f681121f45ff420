"""What will happen to a simulated fleet, in order of time."""

from __future__ import annotations

import heapq
from typing import Any


class Agenda:
    """Future happenings with their payloads; of those at one time, the first added comes first."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, str, Any]] = []
        self._serial = 0

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def next_s(self) -> float:
        """The time of the next happening; there must be one."""
        return self._heap[0][0]

    def add(self, at_s: float, kind: str, payload: Any) -> None:
        """Add a happening of a kind at a time."""
        self._serial += 1
        heapq.heappush(self._heap, (at_s, self._serial, kind, payload))

    def pop(self) -> tuple[float, str, Any]:
        """Remove the next happening, and return its time, kind and payload."""
        at_s, _, kind, payload = heapq.heappop(self._heap)
        return at_s, kind, payload
