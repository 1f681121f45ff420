"""Where a worker's training thread and control thread meet: one lock, six values (rule 3)."""

from __future__ import annotations

import threading
from collections.abc import Callable

from lazarus.control.messages import Report, Tail, Vector
from lazarus.errors import FencedError


class StepLedger:
    """Which generation this rank computes in, how far it is, and what was decided.

    ``gen`` is the group the rank computes in, ``fence`` the highest generation it has heard of. The
    outcome of a step is decided only while both are equal; hearing FENCE freezes it.
    """

    def __init__(self, *, committed: int = 0) -> None:
        self._lock = threading.Lock()
        self._fenced = threading.Condition(self._lock)
        self.gen = 0
        self.fence = 0
        self.committed = committed
        self.prepared = committed
        self.decided = committed  # a decided step counts as committed in a report
        self._vectors: dict[int, Vector] = {}

    def check(self) -> None:
        """Raise if this rank's generation is over.

        Raises:
            FencedError: A higher generation was heard of.
        """
        if self.fence != self.gen:
            raise FencedError(generation=self.gen, fence=self.fence)

    def enter(self, generation: int) -> bool:
        """Begin computing in ``generation`` unless a higher one was heard of meanwhile."""
        with self._lock:
            if self.fence != generation:
                return False
            self.gen = generation
            return True

    def prepare(self, step: int) -> None:
        """All gradients of ``step`` are complete on this rank (rule 9)."""
        with self._lock:
            self.prepared = step

    def withdraw(self) -> None:
        """The attempt is dropped: gradients are scratch again."""
        with self._lock:
            self.prepared = self.decided

    def decide(self, vector: Vector) -> bool:
        """Commit ``vector.step`` if no fence came first (rule 12). False: thrown away for ever."""
        with self._lock:
            if self.fence != self.gen:
                return False
            self._take(vector)
            return True

    def accept(self, vector: Vector) -> None:
        """Commit a step by the controller's verdict (rule 20)."""
        with self._lock:
            self._take(vector)

    def _take(self, vector: Vector) -> None:
        self.decided = vector.step
        self.prepared = vector.step
        self._vectors[vector.step] = vector

    def applied(self, step: int) -> None:
        with self._lock:
            self.committed = step

    def stand(self, step: int) -> None:
        """Start from the state of a committed step (joiner, resume, rollback).

        Vectors of steps behind it belong to a history that is over.
        """
        with self._lock:
            self._vectors = {}
            self.committed = self.prepared = self.decided = step

    def raise_fence(
        self, generation: int, release: Callable[[], None], *, tail: Tail | None = None
    ) -> Report | None:
        """Fence, then release, then report: never the other way round (rule 17).

        Args:
            generation: The one that begins.
            release: Frees the training thread from whatever it waits for.
            tail: Where it was, for the report.

        Returns:
            The frozen report, or None if the fence is not higher than the one heard before.
        """
        with self._lock:
            if generation <= self.fence:
                return None
            self.fence = generation
            report = Report(
                generation=generation,
                committed=self.decided,
                prepared=self.prepared,
                vectors=tuple(self._vectors[step] for step in sorted(self._vectors)),
                entered=self.gen,
                tail=tail or Tail(),
            )
            self._fenced.notify_all()
        release()
        return report

    def acknowledge(self, step: int) -> None:
        """The controller has journaled up to ``step``: forget those vectors, but not the last."""
        with self._lock:
            last = max(self._vectors, default=0)
            self._vectors = {s: v for s, v in self._vectors.items() if s > step or s == last}

    def unacknowledged(self, *, above: int) -> tuple[Vector, ...]:
        with self._lock:
            return tuple(self._vectors[step] for step in sorted(self._vectors) if step > above)
