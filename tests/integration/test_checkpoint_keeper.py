"""A keeper's service: snapshots can be fetched, copied and persisted; who must not is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from keepers import (
    TAG,
    TOY,
    Start,
    Trainer,
    assert_same,
    client,
    keepers,
    request,
)

from lazarus.checkpoint.errors import KeeperUnavailableError, RefusedError
from lazarus.checkpoint.files.reader import CheckpointReader
from lazarus.checkpoint.files.store import Tag, commit_manifest
from lazarus.checkpoint.files.tensors import tensors_of
from lazarus.checkpoint.format.manifest import WrittenFile


@pytest.fixture
def start() -> Iterator[Start]:
    with keepers() as begin:
        yield begin


def test_a_snapshot_can_be_fetched_bit_for_bit(start: Start) -> None:
    keeper = start()
    trainer = Trainer(keeper)
    (report,) = trainer.take(request(7, [(0, 1), (1, 3)]))
    assert report["ok"]
    key, image = client(keeper).fetch(layer=1, expert=3, generation=2, step=7)
    assert key.routed == 70
    assert_same(tensors_of(image, where="test"), TOY.expert(1, 3, 7))
    trainer.close()


def test_the_newest_two_versions_stay_until_the_newer_is_published(start: Start) -> None:
    keeper = start()
    trainer = Trainer(keeper)
    stock = client(keeper)
    for step in (5, 6, 7):
        trainer.take(request(step, [(0, 0)], published=0))
    assert [k.step for k in stock.inventory().keys] == [6, 7]
    trainer.take(request(8, [(0, 1)], published=7))
    assert [(k.expert, k.step) for k in stock.inventory().keys] == [(0, 7), (1, 8)]
    trainer.close()


def test_memory_stays_flat_over_many_snapshots(start: Start) -> None:
    keeper = start()
    trainer = Trainer(keeper)
    reserved = []
    for step in range(1, 31):
        trainer.take(request(step, [(0, e % 4) for e in (step, step + 1)]))
        reserved.append(client(keeper).inventory().reserved_bytes)
    assert reserved[-1] == reserved[9]
    trainer.close()


def test_a_copy_on_another_node_survives_the_first_node(start: Start) -> None:
    first, second = start(), start()
    trainer = Trainer(first)
    copied, _ = trainer.take(request(7, [(0, 1)], copy_to=(second.address,)), "snapshot", "copy")
    assert copied["ok"], copied
    first.process.kill()
    first.process.wait()
    _, image = client(second).fetch(layer=0, expert=1, generation=2, step=7)
    assert_same(tensors_of(image, where="test"), TOY.expert(0, 1, 7))
    trainer.close()


def test_a_copy_to_a_dead_node_is_reported_and_harms_nothing(start: Start) -> None:
    first, second = start(), start()
    second.process.kill()
    second.process.wait()
    trainer = Trainer(first)
    copied, snap = trainer.take(request(7, [(0, 1)], copy_to=(second.address,)), "x", "y")
    assert snap["ok"]
    assert not copied["ok"]
    assert "UNAVAILABLE" in str(copied["error"])
    assert client(first).inventory().keys[0].step == 7
    trainer.close()


def test_the_keeper_persists_what_a_manifest_then_commits(start: Start, tmp_path: Path) -> None:
    keeper = start()
    trainer = Trainer(keeper)
    url = str(tmp_path / "ck")
    persisted, _ = trainer.take(request(7, TOY.all_experts(), url=url), "snapshot", "persist")
    assert persisted["ok"], persisted
    written = [WrittenFile.from_json(f) for f in persisted["files"]]  # type: ignore[attr-defined]
    manifest = commit_manifest(
        url,
        written,
        tag=TAG,
        step=7,
        layers=TOY.layers(),
        dense_names=[s.name for s in TOY.dense_specs()],
        lineage=[(2, 0)],
        meta={},
        previous=None,
    )
    reader = CheckpointReader(url, manifest)
    assert_same(reader.dense(), TOY.dense(7))
    assert_same(reader.expert(1, 2), TOY.expert(1, 2, 7))
    assert manifest.experts[1][2]["weights"].routed == 70
    stock = client(keeper).inventory()
    assert len(stock.keys) == len(TOY.all_experts())
    trainer.close()


def test_a_storage_that_fails_is_reported_and_training_goes_on(
    start: Start, tmp_path: Path
) -> None:
    keeper = start()
    trainer = Trainer(keeper)
    (tmp_path / "ck").write_text("a file where the folder should be")
    url = str(tmp_path / "ck")
    persisted, snap = trainer.take(request(7, [(0, 1)], url=url), "snapshot", "persist")
    assert snap["ok"]
    assert not persisted["ok"]
    assert trainer.snapshotter.wait_before_apply() < 1
    trainer.close()


def test_a_wrong_secret_an_old_generation_and_another_job_are_refused(start: Start) -> None:
    keeper = start()
    with pytest.raises(RefusedError, match="secret"):
        client(keeper, secret="guess").inventory()
    client(keeper).inventory()
    with pytest.raises(RefusedError, match="generation 1\\) is over"):
        client(keeper, tag=Tag(job="job", term=1, generation=1)).inventory()
    with pytest.raises(RefusedError, match="is not 'job'"):
        client(keeper, tag=Tag(job="other", term=1, generation=3)).inventory()
    assert client(keeper).inventory().stale_messages == 2


def test_a_resume_voids_what_a_dead_rank_applied_alone(start: Start) -> None:
    keeper = start()
    trainer = Trainer(keeper)
    trainer.take(request(7, [(0, 0)], published=6))
    trainer.take(request(8, [(0, 0)], published=6))
    newer = client(keeper, tag=Tag(job="job", term=1, generation=3))
    assert newer.tell(lineage=[(2, 0), (3, 7)], resume_step=7) == 1
    assert [k.step for k in newer.inventory().keys] == [7]
    assert newer.tell(drops=[(0, 0, 2, 7)]) == 1
    trainer.close()


def test_a_fenced_keeper_exits_when_told(start: Start) -> None:
    keeper = start()
    client(keeper).tell(leave=True)
    assert keeper.process.wait(10) == 0
    with pytest.raises(KeeperUnavailableError):
        client(keeper).inventory()


def test_without_a_keeper_a_snapshot_fails_and_the_step_goes_on(start: Start) -> None:
    keeper = start()
    trainer = Trainer(keeper)
    trainer.take(request(1, [(0, 0)]))
    keeper.process.kill()
    keeper.process.wait()
    (report,) = trainer.take(request(2, [(0, 0)]))
    assert not report["ok"]
    assert trainer.snapshotter.wait_before_apply() < 1
    trainer.close()


def test_no_room_is_a_reported_failure_not_a_crash(start: Start) -> None:
    keeper = start(limit_bytes=4096)
    trainer = Trainer(keeper)
    (report,) = trainer.take(request(1, TOY.all_experts()))
    assert not report["ok"]
    assert "snapshot memory is full" in str(report["error"])
    trainer.close()
