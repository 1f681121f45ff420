"""Real keepers, and a trainer that takes snapshots of a toy state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from lazarus.checkpoint.files.store import RecordKey, Tag
from lazarus.checkpoint.in_memory.snapshot import SnapshotItem, SnapshotRequest, Snapshotter
from lazarus.checkpoint.testing import ToyState
from lazarus.runtime.keeper.client import KeeperClient
from lazarus.runtime.keeper.process import KeeperConfig, KeeperProcess, start_keeper
from lazarus.runtime.keeper.trainer_link import RemoteKeeperLink
from lazarus.runtime.rpc.credentials import Credentials

TOY = ToyState()
SECRET = "s3cret"
TAG = Tag(job="job", term=1, generation=2)
REPORT_TIMEOUT_S = 20.0

Start = Callable[..., KeeperProcess]


@contextmanager
def keepers() -> Iterator[Start]:
    """Starts keepers, and stops them in the end."""
    running: list[KeeperProcess] = []

    def begin(**changes: object) -> KeeperProcess:
        plain = KeeperConfig(job="job", credentials=Credentials(secret=SECRET), silent_s=30.0)
        config = replace(plain, **changes)  # type: ignore[arg-type]
        running.append(start_keeper(config))
        return running[-1]

    yield begin
    for keeper in running:
        keeper.stop()


def client(keeper: KeeperProcess, *, tag: Tag = TAG, secret: str = SECRET) -> KeeperClient:
    credentials = Credentials(secret=secret)
    return KeeperClient(keeper.address, credentials=credentials, tag=tag, timeout_s=10)


def request(step: int, experts: list[tuple[int, int]], **extra: object) -> SnapshotRequest:
    items = [
        SnapshotItem(
            key=RecordKey(layer=x, expert=e, step=step, generation=2, routed=10 * step),
            tensors=TOY.expert(x, e, step),
            copy_to=extra.get("copy_to", ()),  # type: ignore[arg-type]
            persist="url" in extra,
        )
        for x, e in experts
    ]
    if "url" in extra:
        key = RecordKey(layer=-1, expert=0, step=step, generation=2)
        items.append(SnapshotItem(key=key, tensors=TOY.dense(step), persist=True))
    return SnapshotRequest(
        tag=TAG,
        step=step,
        items=tuple(items),
        url=str(extra.get("url", "")),
        published_step=int(extra.get("published", step - 1)),  # type: ignore[call-overload]
    )


class Trainer:
    """A snapshotter with its link, in this process."""

    def __init__(self, keeper: KeeperProcess) -> None:
        self.link = RemoteKeeperLink(
            keeper.address, credentials=Credentials(secret=SECRET), timeout_s=5.0
        )
        self.snapshotter = Snapshotter(self.link)

    def take(self, wanted: SnapshotRequest, *kinds: str) -> list[dict[str, object]]:
        """Take one snapshot and wait for one report of each kind."""
        assert self.snapshotter.begin(wanted)
        found = []
        for _ in kinds or ("snapshot",):
            report = self.snapshotter.next_report(REPORT_TIMEOUT_S)
            assert report is not None
            found.append(report)
        return sorted(found, key=lambda r: r["kind"])

    def close(self) -> None:
        self.snapshotter.close()
        self.link.close()


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
