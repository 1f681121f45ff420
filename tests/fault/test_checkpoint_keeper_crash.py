"""kill -9 of a keeper while it persists: nothing half-written is ever chosen."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from lazarus.checkpoint.errors import IncompleteCheckpointError
from lazarus.checkpoint.files.retention import retain
from lazarus.checkpoint.files.store import RecordKey, Tag, commit_manifest
from lazarus.checkpoint.files.verify import newest_usable, verify
from lazarus.checkpoint.format.manifest import WrittenFile
from lazarus.checkpoint.in_memory.snapshot import SnapshotItem, SnapshotRequest, Snapshotter
from lazarus.checkpoint.testing import ToyState
from lazarus.runtime.keeper.process import KeeperConfig, start_keeper
from lazarus.runtime.keeper.trainer_link import RemoteKeeperLink
from lazarus.runtime.rpc.credentials import Credentials

TOY = ToyState()
TAG = Tag(job="job", term=1, generation=1)


def persist(url: str, step: int, *, kill_at: str = "") -> list[dict[str, object]]:
    """Persist everything through a keeper of its own; all reports until it ended or died."""
    config = KeeperConfig(job="job", credentials=Credentials(secret="s"), silent_s=30.0)
    keeper = start_keeper(replace(config, kill_at=kill_at))
    link = RemoteKeeperLink(keeper.address, credentials=Credentials(secret="s"), timeout_s=5.0)
    snapshotter = Snapshotter(link)
    items = [
        SnapshotItem(
            key=RecordKey(layer=x, expert=e, step=step, generation=1),
            tensors=TOY.expert(x, e, step),
            persist=True,
        )
        for x, e in TOY.all_experts()
    ]
    dense = RecordKey(layer=-1, expert=0, step=step, generation=1)
    items.append(SnapshotItem(key=dense, tensors=TOY.dense(step), persist=True))
    request = SnapshotRequest(
        tag=TAG, step=step, items=tuple(items), url=url, published_step=step - 1
    )
    assert snapshotter.begin(request)
    found = []
    if kill_at:
        assert keeper.process.wait(30) == -signal.SIGKILL, "the kill must happen"
    while report := snapshotter.next_report(20.0 if not kill_at else 0.0):
        found.append(report)
        if report["kind"] == "persist":
            break
    snapshotter.close()
    link.close()
    keeper.stop()
    return found


def commit(url: str, step: int, reports: list[dict[str, object]]) -> None:
    files = [f for r in reports if r["kind"] == "persist" for f in r["files"]]  # type: ignore
    commit_manifest(
        url,
        [WrittenFile.from_json(f) for f in files],
        tag=TAG,
        step=step,
        layers=TOY.layers(),
        dense_names=[s.name for s in TOY.dense_specs()],
        lineage=[(1, 0)],
        meta={},
        previous=None,
    )


@pytest.mark.parametrize("point", ["file.written:4", "file.renamed:9"])
def test_a_keeper_killed_while_persisting_leaves_the_previous_checkpoint(
    tmp_path: Path, point: str
) -> None:
    url = str(tmp_path / "ck")
    commit(url, 100, persist(url, 100))
    reports = persist(url, 200, kill_at=point)
    with pytest.raises(IncompleteCheckpointError):
        commit(url, 200, reports)
    assert newest_usable(url, check="sha256").step == 100
    assert verify(url).bad == ()
    commit(url, 300, persist(url, 300))
    retain(url, keep=1)
    assert verify(url).foreign == ()
    assert newest_usable(url, check="sha256").step == 300
    assert not [name for name in os.listdir("/dev/shm") if name.startswith("lazarus")]
