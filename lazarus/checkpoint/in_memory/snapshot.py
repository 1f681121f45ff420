"""Snapshots, the trainer's side: copy selected state while the next step computes. EFFECTS.

Between the optimizer step of t and that of t+1 the training tensors do not change, so a background
thread may read them. ``wait_before_apply`` ends this window: it returns only when no copy reads
the tensors any more. It never waits for the network, only for a memory copy in progress and
briefly for the keeper on the same machine.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import torch
from torch import Tensor

from lazarus.basics.threads import spawn
from lazarus.checkpoint.files.store import RecordKey, Tag
from lazarus.checkpoint.files.tensors import fill_image, specs_of
from lazarus.errors import LazarusError


class KeeperLink(Protocol):
    """A trainer's connection to its node's keeper."""

    def reserve(
        self,
        ticket: int,
        *,
        tag: Tag,
        keys: Sequence[RecordKey],
        sizes: Sequence[int],
        published: int,
    ) -> list[memoryview]:
        """Reserve host memory for records, one view for each key.

        Raises:
            CheckpointError: The keeper has no memory left, or refuses.
        """
        ...

    def seal(
        self, ticket: int, *, copies: Mapping[int, Sequence[str]], persist: Sequence[int], url: str
    ) -> None:
        """Tell the keeper that the records are complete, and where to copy and persist them."""
        ...

    def abandon(self, ticket: int) -> None:
        """Tell the keeper that the records will not be completed or written to any more."""
        ...

    def add_report(self, record: dict[str, Any]) -> None:
        """Add a report that ``reports`` and ``next_report`` will return."""
        ...

    def reports(self) -> list[dict[str, Any]]:
        """Reports of everything that has ended since the last call."""
        ...

    def next_report(self, timeout_s: float) -> dict[str, Any] | None:
        """Wait for the oldest report not returned yet; None after ``timeout_s`` seconds."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class SnapshotItem:
    """One record of a snapshot: its tensors by global name, on any device, contiguous.

    ``copy_to`` holds addresses of other nodes' keepers that get a copy; ``persist`` says whether
    the keeper also writes the record to storage.
    """

    key: RecordKey
    tensors: Mapping[str, Tensor]
    copy_to: tuple[str, ...] = ()
    persist: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class SnapshotRequest:
    """Everything that this rank snapshots at one step."""

    tag: Tag
    step: int
    items: tuple[SnapshotItem, ...]
    url: str
    published_step: int


class _State(Enum):
    IDLE = "idle"
    RESERVING = "reserving"  # waits for the keeper; nothing reads the tensors yet
    COPYING = "copying"
    SEALING = "sealing"  # nothing reads the tensors any more


class Snapshotter:
    """Takes snapshots in a background thread, one at a time.

    Args:
        link: Connection to this node's keeper.
        patience_s: Seconds for which ``wait_before_apply`` waits for the keeper's memory.
    """

    def __init__(self, link: KeeperLink, *, patience_s: float = 0.25) -> None:
        self._link = link
        self._patience_s = patience_s
        self._changed = threading.Condition()
        self._state = _State.IDLE
        self._request: SnapshotRequest | None = None
        self._ready: Any = None  # CUDA event: the last write to the tensors has ended
        self._cancelled = False
        self._closed = False
        self._ticket = 0
        self._copied = (0, 0.0)  # bytes and seconds of all copies so far
        self._death: BaseException | None = None
        self._thread = spawn("snapshot", self._run, on_death=self._died)

    def _died(self, name: str, problem: BaseException) -> None:
        """Wake up callers that wait for a copy which the dead thread cannot finish."""
        with self._changed:
            self._death, self._closed = problem, True
            self._request = self._ready = None
            self._state = _State.IDLE
            self._changed.notify_all()

    def _check(self) -> None:
        """Raise if the copying thread died: its last record may be half written."""
        if self._death is not None:
            text = "the thread that copies snapshots died"
            raise LazarusError(f"{text}: {self._death!r}") from self._death

    def begin(self, request: SnapshotRequest) -> bool:
        """Start a snapshot right after the optimizer step of a commit; return at once.

        Returns:
            False if an earlier snapshot has not ended; then nothing is started.
        """
        cuda = any(t.is_cuda for item in request.items for t in item.tensors.values())
        ready = torch.cuda.current_stream().record_event() if cuda else None
        with self._changed:
            self._check()
            if self._state is not _State.IDLE or self._closed:
                return False
            self._request, self._ready, self._cancelled = request, ready, False
            self._state = _State.RESERVING
            self._changed.notify_all()
        return True

    def wait_before_apply(self) -> float:
        """Return once nothing reads the training tensors; call before anything changes them.

        A copy in progress is waited for. A snapshot that still waits for the keeper's memory is
        cancelled after ``patience_s`` seconds: a stopped keeper must not stop training.

        Returns:
            Seconds that the caller was kept waiting.
        """
        start = time.monotonic()
        with self._changed:
            if self._state is _State.RESERVING:
                self._changed.wait_for(
                    lambda: self._state is not _State.RESERVING, self._patience_s
                )
                self._cancelled = self._state is _State.RESERVING
            while self._state is _State.COPYING:
                self._changed.wait()
            self._check()
        return time.monotonic() - start

    def reports(self) -> list[dict[str, Any]]:
        """JSON reports of the snapshots, copies and persists that ended since the last call."""
        return self._link.reports()

    def next_report(self, timeout_s: float) -> dict[str, Any] | None:
        """Wait for the oldest report not returned yet; None after ``timeout_s`` seconds."""
        return self._link.next_report(timeout_s)

    def rate(self) -> float | None:
        """Mean bytes per second of all copies so far; None before the first copy."""
        with self._changed:
            num_bytes, seconds = self._copied
        return num_bytes / seconds if seconds > 0 else None

    @property
    def busy(self) -> bool:
        """Whether a snapshot is in progress."""
        with self._changed:
            return self._state is not _State.IDLE

    def close(self) -> None:
        """End the background thread after the snapshot in progress, if any."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while self._request is None and not self._closed:
                    self._changed.wait()
                if self._request is None:
                    return
                request, self._ticket = self._request, self._ticket + 1
            start = time.monotonic()
            try:
                problem = self._take(request)
            except Exception as error:  # noqa: BLE001 - the thread's edge: reported, training goes on
                problem = f"{type(error).__name__}: {error}"
            if problem:
                self._link.add_report(_failure(request, problem, time.monotonic() - start))
            with self._changed:
                self._request = self._ready = None
                self._state = _State.IDLE
                self._changed.notify_all()
            del request

    def _take(self, request: SnapshotRequest) -> str:
        """Take one snapshot. Return why the snapshot was not taken, or an empty string."""
        items = request.items
        layouts = [item.key.layout(specs_of(item.tensors), request.tag) for item in items]
        places = self._link.reserve(
            self._ticket,
            tag=request.tag,
            keys=[item.key for item in items],
            sizes=[layout.num_bytes for layout in layouts],
            published=request.published_step,
        )
        with self._changed:
            if self._cancelled:
                self._link.abandon(self._ticket)
                return "the next optimizer step came before the keeper answered"
            self._state = _State.COPYING
            self._changed.notify_all()
        start = time.monotonic()
        try:
            self._copy(items, layouts, places)
        except BaseException:
            self._link.abandon(self._ticket)
            raise
        with self._changed:
            num_bytes = sum(layout.num_bytes for layout in layouts)
            self._copied = (self._copied[0] + num_bytes, self._copied[1] + time.monotonic() - start)
            self._state = _State.SEALING
            self._changed.notify_all()
        self._link.seal(
            self._ticket,
            copies={i: item.copy_to for i, item in enumerate(items) if item.copy_to},
            persist=[i for i, item in enumerate(items) if item.persist],
            url=request.url,
        )
        return ""

    def _copy(
        self, items: Sequence[SnapshotItem], layouts: Sequence[Any], places: Sequence[memoryview]
    ) -> None:
        if self._ready is None:
            for item, layout, place in zip(items, layouts, places, strict=True):
                fill_image(place, layout, item.tensors)
            return
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_event(self._ready)
        with torch.cuda.stream(side):
            for item, layout, place in zip(items, layouts, places, strict=True):
                fill_image(place, layout, item.tensors)
        side.synchronize()


def _failure(request: SnapshotRequest, problem: str, wall_s: float) -> dict[str, Any]:
    return {
        "kind": "snapshot",
        "ok": False,
        "step": request.step,
        "generation": request.tag.generation,
        "persist": any(item.persist for item in request.items),
        "wall_s": wall_s,
        "error": problem,
    }
