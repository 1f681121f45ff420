"""Random faults that the driver injects; the same seed draws the same faults."""

from __future__ import annotations

import threading
import time
from typing import Protocol

from lazarus.basics.threads import spawn
from lazarus.faults import ChaosSpec, chaos_events

DRIVER_KINDS = frozenset({"kill", "join", "leave", "controller"})
PROCESS_KINDS = frozenset({"stop", "stall", "slow", "crash"})  # a process does these to itself
CHAOS_KINDS = DRIVER_KINDS | PROCESS_KINDS
FATAL_KINDS = CHAOS_KINDS - {"join", "controller", "slow"}  # faults that end a node


class Striker(Protocol):
    """Injects faults into nodes: the driver."""

    def has_room(self) -> bool: ...
    def live_nodes(self) -> list[str]: ...
    def inject(self, kind: str, node_key: str, spec: str) -> None: ...
    def thread_died(self, name: str, problem: BaseException) -> None: ...


class Chaos:
    """Injects the faults of a seed at their times, in a thread; never ends the last node."""

    def __init__(self, spec: ChaosSpec, striker: Striker) -> None:
        self._spec = spec
        self._striker = striker
        self._closed = threading.Event()
        self._started = time.monotonic()
        # If this thread died silently, a run without faults would pass for one that survived them.
        self._thread = spawn("chaos", self._run, on_death=striker.thread_died)

    def _run(self) -> None:
        for event in chaos_events(self._spec):
            if self._closed.wait(max(0.0, self._started + event.at_s - time.monotonic())):
                return
            live = self._striker.live_nodes()
            if event.kind in FATAL_KINDS and len(live) < 2:
                continue
            if event.kind == "join" and not self._striker.has_room():
                continue
            chosen = live[int(event.pick * len(live))] if live else ""
            key = "" if event.kind in ("join", "controller") else chosen
            self._striker.inject(event.kind, key, f"chaos:{event.kind}")

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
