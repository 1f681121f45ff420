"""A test by one node that the checkpoint place can be written, read and seen by other nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lazarus.checkpoint.files.patience import patiently
from lazarus.checkpoint.files.place import remove_probe, sees_probe, write_probe
from lazarus.checkpoint.files.storage import redacted
from lazarus.control.messages import Seat, StorageProblem, problem_of
from lazarus.errors import StorageError


class PlaceProbe:
    """Writes a probe file, and reads the file of another node.

    Files are written before the groups are built and read afterwards, when every node must have
    written its own.

    Attributes:
        problem: Why this node cannot use the checkpoint place; None if it can.
    """

    def __init__(
        self, url: str, *, run: str, node: int, patience_s: float, waiting: Callable[[], None]
    ) -> None:
        self._url, self._run, self._node = url, run, node
        self._patience_s, self._waiting = patience_s, waiting
        self.problem: StorageProblem | None = None

    def _name(self, node: int) -> str:
        return f"probe-{self._run}-{node}"

    def write(self) -> None:
        """Write this node's probe file, and read it back."""
        self._try(lambda: write_probe(self._url, self._name(self._node)), "write")

    def read(self, seats: Sequence[Seat]) -> None:
        """Look for the probe file of the next node; it is missing if the folder is not shared."""
        nodes = sorted({seat.node for seat in seats})
        other = nodes[(nodes.index(self._node) + 1) % len(nodes)]
        if self.problem is None:
            self._try(lambda: self._see(other), "read")

    def _see(self, other: int) -> None:
        if not sees_probe(self._url, self._name(other)):
            raise StorageError(
                url=redacted(self._url),
                operation="read",
                reason=f"node {self._node} does not see what node {other} wrote: is it shared?",
            )

    def close(self) -> None:
        """Remove this node's file, which every node has read by now. Errors are ignored."""
        found = self.problem
        self._try(lambda: remove_probe(self._url, self._name(self._node)), "delete")
        self.problem = found

    def _try(self, work: Callable[[], None], operation: str) -> None:
        try:
            patiently(
                work,
                for_s=self._patience_s / 2,
                stuck_s=self._patience_s,
                waiting=self._waiting,
                place=redacted(self._url),
                operation=operation,
            )
        except StorageError as problem:
            self.problem = problem_of(problem)
