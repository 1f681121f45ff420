"""Level 1, the trainer's side: copy chosen state while the next step computes. EFFECTS.

Between the optimizer step of t and that of t+1 the training tensors stand still, so one background
thread may read them. ``wait_before_apply`` closes that window: it returns only when no copy reads
them any more. It never waits for a network: for a memory copy under way, and briefly for the
keeper on this very machine.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
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
        """Host memory for the records; raises CheckpointError where there is none."""
        ...

    def seal(
        self, ticket: int, *, copies: Mapping[int, Sequence[str]], persist: Sequence[int], url: str
    ) -> None:
        """The records are complete."""
        ...

    def abandon(self, ticket: int) -> None:
        """The records will not be completed, and nothing writes to them any more."""
        ...

    def add_report(self, record: dict[str, Any]) -> None:
        """Put a record where ``reports`` finds it."""
        ...

    def reports(self) -> list[dict[str, Any]]:
        """What ended since the last call."""
        ...

    def next_report(self, timeout_s: float) -> dict[str, Any] | None:
        """The oldest report not taken yet, waiting for one; None if none comes in time."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class SnapshotItem:
    """One record to take: its tensors by global name, on any device, contiguous.

    ``copy_to`` are addresses of other nodes' keepers; ``persist`` sends it on to storage.
    """

    key: RecordKey
    tensors: Mapping[str, Tensor]
    copy_to: tuple[str, ...] = ()
    persist: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class SnapshotRequest:
    """All that this rank snapshots at one step."""

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
    """One background thread that takes snapshots, one at a time."""

    def __init__(
        self,
        link: KeeperLink,
        *,
        patience_s: float = 0.25,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._link = link
        self._patience_s = patience_s
        self._clock = clock
        self._changed = threading.Condition()
        self._state = _State.IDLE
        self._request: SnapshotRequest | None = None
        self._ready: Any = None  # CUDA event: the tensors' last write has ended
        self._cancelled = False
        self._closed = False
        self._ticket = 0
        self._copied = (0, 0.0)  # bytes and seconds of all copies so far
        self._death: BaseException | None = None
        self._thread = spawn("snapshot", self._run, on_death=self._died)

    def _died(self, name: str, problem: BaseException) -> None:
        """Whoever waits for a copy must not wait for ever."""
        with self._changed:
            self._death, self._closed = problem, True
            self._request = self._ready = None
            self._state = _State.IDLE
            self._changed.notify_all()

    def _check(self) -> None:
        """A copy that broke off may have left half a record behind: this rank says so and ends."""
        if self._death is not None:
            text = "the thread that copies snapshots died"
            raise LazarusError(f"{text}: {self._death!r}") from self._death

    def begin(self, request: SnapshotRequest) -> bool:
        """Start a snapshot right after a commit's apply; returns at once.

        Returns:
            False if an earlier one has not ended: this one is not taken.
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

        A copy under way is waited for. A snapshot whose memory the keeper has not granted yet is
        given ``patience_s``, then given up: a stopped keeper must not stop training.

        Returns:
            Seconds that the caller was kept waiting.
        """
        start = self._clock()
        with self._changed:
            if self._state is _State.RESERVING:
                self._changed.wait_for(
                    lambda: self._state is not _State.RESERVING, self._patience_s
                )
                self._cancelled = self._state is _State.RESERVING
            while self._state is _State.COPYING:
                self._changed.wait()
            self._check()
        return self._clock() - start

    def reports(self) -> list[dict[str, Any]]:
        """What ended since the last call: JSON records of snapshots, copies and persists."""
        return self._link.reports()

    def next_report(self, timeout_s: float) -> dict[str, Any] | None:
        """The oldest report not taken yet, waiting for one; None if none comes in time."""
        return self._link.next_report(timeout_s)

    def rate(self) -> float | None:
        """Bytes per second of the copies so far, while the step ran beside; None before any."""
        with self._changed:
            num_bytes, seconds = self._copied
        return num_bytes / seconds if seconds > 0 else None

    @property
    def busy(self) -> bool:
        """Whether a snapshot is under way."""
        with self._changed:
            return self._state is not _State.IDLE

    def close(self) -> None:
        """End the thread after the snapshot under way, if any."""
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
            start = self._clock()
            try:
                problem = self._take(request)
            except Exception as error:  # noqa: BLE001 - the thread's edge: reported, training goes on
                problem = f"{type(error).__name__}: {error}"
            if problem:
                self._link.add_report(_failure(request, problem, self._clock() - start))
            with self._changed:
                self._request = self._ready = None
                self._state = _State.IDLE
                self._changed.notify_all()
            del request

    def _take(self, request: SnapshotRequest) -> str:
        """Take one snapshot; the reason why not, or nothing."""
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
        start = self._clock()
        try:
            self._copy(items, layouts, places)
        except BaseException:
            self._link.abandon(self._ticket)
            raise
        with self._changed:
            num_bytes = sum(layout.num_bytes for layout in layouts)
            self._copied = (self._copied[0] + num_bytes, self._copied[1] + self._clock() - start)
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
