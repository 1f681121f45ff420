"""The step state that a worker's training and control threads share, behind one lock.

Rules named in this module ("rule 3") are those of docs/protocol.md; this module is rule 3.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from lazarus.control.messages import Report, Tail, Vector
from lazarus.errors import FencedError


class StepLedger:
    """Generation, progress and committed vectors of one rank. Safe to use from any thread.

    ``gen`` is the generation the rank computes in, ``fence`` the highest generation it has been
    told of. A step can be decided only while the two are equal; a FENCE message ends that.
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
            FencedError: The rank has been told of a higher generation.
        """
        if self.fence != self.gen:
            raise FencedError(generation=self.gen, fence=self.fence)

    def enter(self, generation: int) -> bool:
        """Begin computing in ``generation``; return False if a higher one has been announced."""
        with self._lock:
            if self.fence != generation:
                return False
            self.gen = generation
            return True

    def prepare(self, step: int) -> None:
        """Note that all gradients of ``step`` are complete on this rank (rule 9)."""
        with self._lock:
            self.prepared = step

    def withdraw(self) -> None:
        """Drop the attempt at the current step: its gradients no longer count as complete."""
        with self._lock:
            self.prepared = self.decided

    def decide(self, vector: Vector) -> bool:
        """Commit ``vector.step`` unless a fence came first (rule 12).

        Returns:
            Whether the step is committed. If False, the vector must never be used.
        """
        with self._lock:
            if self.fence != self.gen:
                return False
            self._take(vector)
            return True

    def accept(self, vector: Vector) -> None:
        """Commit a step because the controller says that it is committed (rule 20)."""
        with self._lock:
            self._take(vector)

    def _take(self, vector: Vector) -> None:
        self.decided = vector.step
        self.prepared = vector.step
        self._vectors[vector.step] = vector

    def applied(self, step: int) -> None:
        """Note that the optimizer step of ``step`` has been applied on this rank."""
        with self._lock:
            self.committed = step

    def start_from(self, step: int) -> None:
        """Start from the state of a committed step: when joining, resuming or rolling back.

        Vectors of earlier steps are forgotten: they belong to a history that no longer counts.
        """
        with self._lock:
            self._vectors = {}
            self.committed = self.prepared = self.decided = step

    def raise_fence(
        self, generation: int, release: Callable[[], None], *, tail: Tail | None = None
    ) -> Report | None:
        """Fence first, then release the training thread and return the report (rule 17).

        Args:
            generation: The generation that begins.
            release: Frees the training thread from whatever it waits for.
            tail: The training thread's newest exchanges, for the report.

        Returns:
            The report, frozen at the fence, or None if ``generation`` is not higher than the
            fence so far.
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
        """Forget the vectors up to ``step``, except the last: the controller has journaled them."""
        with self._lock:
            last = max(self._vectors, default=0)
            self._vectors = {s: v for s, v in self._vectors.items() if s > step or s == last}

    def unacknowledged(self, *, above: int) -> tuple[Vector, ...]:
        """The vectors of steps after ``above``, by step."""
        with self._lock:
            return tuple(self._vectors[step] for step in sorted(self._vectors) if step > above)
