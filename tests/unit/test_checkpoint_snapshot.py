"""The window between two optimizer steps: no copy reads tensors that an apply writes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import lazarus.checkpoint.in_memory.snapshot as snapshot
from lazarus.checkpoint.errors import KeeperUnavailableError
from lazarus.checkpoint.files.store import RecordKey, Tag
from lazarus.checkpoint.files.tensors import DTYPE_NAMES, fill_image, specs_of, tensors_of
from lazarus.checkpoint.in_memory.snapshot import SnapshotItem, SnapshotRequest, Snapshotter
from lazarus.errors import LazarusError

TAG = Tag(job="job", term=1, generation=1)
PATIENCE_S = 10.0


class FakeKeeper:
    """A keeper in this process, whose answers a test can hold back."""

    def __init__(self) -> None:
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.sealed: queue.SimpleQueue[list[bytearray]] = queue.SimpleQueue()
        self.abandoned: list[int] = []
        self.broken = False
        self._slots: list[bytearray] = []
        self._reports: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def reserve(
        self,
        ticket: int,
        *,
        tag: Tag,
        keys: Sequence[RecordKey],
        sizes: Sequence[int],
        published: int,
    ) -> list[memoryview]:
        assert self.may_answer.wait(PATIENCE_S)
        if self.broken:
            raise KeeperUnavailableError("gone")
        self._slots = [bytearray(size) for size in sizes]
        return [memoryview(slot) for slot in self._slots]

    def seal(
        self, ticket: int, *, copies: Mapping[int, Sequence[str]], persist: Sequence[int], url: str
    ) -> None:
        self.sealed.put(self._slots)

    def abandon(self, ticket: int) -> None:
        self.abandoned.append(ticket)

    def add_report(self, record: dict[str, Any]) -> None:
        self._reports.put(record)

    def reports(self) -> list[dict[str, Any]]:
        return [self._reports.get() for _ in range(self._reports.qsize())]

    def next_report(self, timeout_s: float) -> dict[str, Any] | None:
        return self._reports.get(timeout=timeout_s)


def request(tensors: Mapping[str, Tensor], *, step: int = 1, experts: int = 1) -> SnapshotRequest:
    items = tuple(
        SnapshotItem(key=RecordKey(layer=0, expert=e, step=step, generation=1), tensors=tensors)
        for e in range(experts)
    )
    return SnapshotRequest(tag=TAG, step=step, items=items, url="", published_step=0)


@pytest.fixture
def keeper() -> FakeKeeper:
    return FakeKeeper()


def test_the_apply_waits_for_a_copy_under_way_and_the_snapshot_holds_old_values(
    keeper: FakeKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = torch.zeros(1000)
    copying, may_copy = threading.Event(), threading.Event()
    plain = snapshot.fill_image

    def slow(target: Any, layout: Any, tensors: Any) -> None:
        copying.set()
        assert may_copy.wait(PATIENCE_S)
        plain(target, layout, tensors)

    monkeypatch.setattr(snapshot, "fill_image", slow)
    snapshotter = Snapshotter(keeper)
    snapshotter.begin(request({"model.w": weights}))
    assert copying.wait(PATIENCE_S)
    applied = threading.Event()

    def apply() -> None:
        snapshotter.wait_before_apply()
        weights.fill_(7.0)
        applied.set()

    thread = threading.Thread(target=apply)
    thread.start()
    assert not applied.wait(0.05), "the apply must not start while the copy reads"
    may_copy.set()
    thread.join()
    (image,) = keeper.sealed.get(timeout=PATIENCE_S)
    assert torch.equal(tensors_of(image, where="test")["model.w"], torch.zeros(1000))
    snapshotter.close()


def test_no_snapshot_ever_mixes_two_steps(keeper: FakeKeeper) -> None:
    # The production loop at full speed; every sealed image must be of exactly one step.
    weights = {f"model.w{i}": torch.zeros(50_000) for i in range(4)}
    snapshotter = Snapshotter(keeper)
    taken = 0
    for step in range(1, 100):
        snapshotter.wait_before_apply()
        for tensor in weights.values():  # the apply
            tensor.fill_(float(step))
        taken += snapshotter.begin(request(weights, step=step, experts=2))
    snapshotter.wait_before_apply()
    snapshotter.close()
    steps = []
    while not keeper.sealed.empty():
        values = {
            float(v)
            for image in keeper.sealed.get()
            for tensor in tensors_of(image, where="test").values()
            for v in tensor.unique()
        }
        assert len(values) == 1, values
        steps.append(values.pop())
    assert steps == sorted(set(steps))
    assert taken >= len(steps) > 20


def test_a_keeper_that_does_not_answer_never_delays_the_apply(keeper: FakeKeeper) -> None:
    keeper.may_answer.clear()
    snapshotter = Snapshotter(keeper, patience_s=0.01)
    assert snapshotter.begin(request({"model.w": torch.ones(3)}))
    assert snapshotter.wait_before_apply() < 0.5
    assert not snapshotter.begin(request({"model.w": torch.ones(3)}, step=2)), "one at a time"
    keeper.may_answer.set()
    report = snapshotter.next_report(PATIENCE_S)
    assert report is not None
    assert "before the keeper answered" in report["error"]
    assert keeper.abandoned == [1]
    snapshotter.close()
    assert keeper.sealed.empty()


def test_a_failed_snapshot_is_reported_and_the_next_one_is_taken(keeper: FakeKeeper) -> None:
    snapshotter = Snapshotter(keeper)
    keeper.broken = True
    snapshotter.begin(request({"model.w": torch.ones(3)}))
    report = snapshotter.next_report(PATIENCE_S)
    assert report is not None
    assert not report["ok"]
    keeper.broken = False
    while not snapshotter.begin(request({"model.w": torch.ones(3)}, step=2)):
        continue
    assert keeper.sealed.get(timeout=PATIENCE_S)
    snapshotter.close()


def test_a_copy_that_raises_gives_its_memory_back(
    keeper: FakeKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(target: Any, layout: Any, tensors: Any) -> None:
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(snapshot, "fill_image", broken)
    snapshotter = Snapshotter(keeper)
    snapshotter.begin(request({"model.w": torch.ones(3)}))
    report = snapshotter.next_report(PATIENCE_S)
    assert report is not None
    assert "CUDA error" in report["error"]
    assert keeper.abandoned == [1]
    assert snapshotter.wait_before_apply() < 0.5
    snapshotter.close()


def test_every_dtype_survives_the_image() -> None:
    tensors = {
        f"model.{i}": (torch.arange(13) % 2).to(dtype).reshape(13, 1)
        for i, dtype in enumerate(DTYPE_NAMES)
    }
    tensors["model.scalar"] = torch.tensor(3.5)
    tensors["model.empty"] = torch.empty(0, 4)
    tensors["model.strided"] = torch.arange(12.0).reshape(3, 4).t()
    key = RecordKey(layer=0, expert=0, step=1, generation=1)
    layout = key.layout(specs_of(tensors), Tag(job="a", term=1, generation=1))
    image = bytearray(layout.num_bytes)
    fill_image(memoryview(image), layout, tensors)
    back = tensors_of(image, where="test")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[n], t) and back[n].dtype == t.dtype for n, t in tensors.items())


def test_a_thread_that_dies_while_it_copies_ends_the_wait_of_the_apply(
    keeper: FakeKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rank says so and ends: what waits for a dead thread would wait for ever."""
    copying = threading.Event()

    def leaves(target: Any, layout: Any, tensors: Any) -> None:
        copying.set()
        raise SystemExit("on purpose")

    monkeypatch.setattr(snapshot, "fill_image", leaves)
    snapshotter = Snapshotter(keeper)
    assert snapshotter.begin(request({"w": torch.zeros(4)}))
    assert copying.wait(10)
    snapshotter._thread.join(10)
    with pytest.raises(LazarusError, match="thread that copies snapshots died: SystemExit"):
        snapshotter.wait_before_apply()
    with pytest.raises(LazarusError, match="thread that copies snapshots died"):
        snapshotter.begin(request({"w": torch.zeros(4)}))
    snapshotter.close()
