"""A real keeper process: snapshots outlive trainers, copies cross nodes, nothing stays behind."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
import torch
from certificates import make_pair

from lazarus.checkpoint.errors import KeeperUnavailableError, RefusedError
from lazarus.checkpoint.files.reader import CheckpointReader
from lazarus.checkpoint.files.store import RecordKey, Tag, commit_manifest
from lazarus.checkpoint.files.tensors import tensors_of
from lazarus.checkpoint.format.manifest import WrittenFile
from lazarus.checkpoint.in_memory.snapshot import SnapshotItem, SnapshotRequest, Snapshotter
from lazarus.checkpoint.testing import ToyState
from lazarus.runtime.keeper.client import KeeperClient
from lazarus.runtime.keeper.process import KeeperConfig, KeeperProcess, start_keeper
from lazarus.runtime.keeper.trainer_link import RemoteKeeperLink
from lazarus.runtime.rpc import codec
from lazarus.runtime.rpc.channel import KEEPER, method
from lazarus.runtime.rpc.credentials import Credentials
from lazarus.runtime.rpc.keeper_messages import Order

TOY = ToyState()
SECRET = "s3cret"
TAG = Tag(job="job", term=1, generation=2)
REPORT_TIMEOUT_S = 20.0

Start = Callable[..., KeeperProcess]


@pytest.fixture
def start() -> Iterator[Start]:
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


def test_keepers_listen_on_loopback_unless_told_otherwise(start: Start) -> None:
    keeper = start()
    assert keeper.address.startswith("127.0.0.1:")
    port = int(keeper.address.rpartition(":")[2])
    tables = [Path(f"/proc/net/{name}").read_text() for name in ("tcp", "tcp6")]
    rows = [line.split() for table in tables for line in table.splitlines()[1:]]
    ours = {r[1].partition(":")[0] for r in rows if r[1].endswith(f":{port:04X}") and r[3] == "0A"}
    assert ours
    assert ours <= {"0100007F", "0000000000000000FFFF00000100007F"}


OWNER = """
import sys, os
from lazarus.runtime.keeper.process import KeeperConfig, start_keeper
from lazarus.runtime.rpc.credentials import Credentials
keeper = start_keeper(KeeperConfig(job="job", credentials=Credentials(secret="x"), silent_s=30.0))
print(keeper.process.pid, flush=True)
sys.stdin.readline()
"""


def test_a_keeper_ends_with_its_owner_and_leaves_nothing_behind() -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    handle = os.pidfd_open(pid)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    ended = select.poll()  # unlike select.select, for descriptors of any number
    ended.register(handle, select.POLLIN)
    ready = ended.poll(10_000)
    os.close(handle)
    assert ready, "the keeper outlived its owner"
    assert not [name for name in os.listdir("/dev/shm") if name.startswith("lazarus")]


TRAINER = """
import sys, threading
from lazarus.checkpoint.in_memory.snapshot import SnapshotItem, Snapshotter, SnapshotRequest
from lazarus.checkpoint.files.store import RecordKey, Tag
from lazarus.checkpoint.testing import ToyState
from lazarus.runtime.keeper.trainer_link import RemoteKeeperLink
from lazarus.runtime.rpc import codec
from lazarus.runtime.rpc.channel import KEEPER, method
from lazarus.runtime.rpc.keeper_messages import Order
from lazarus.runtime.rpc.credentials import Credentials
import lazarus.checkpoint.in_memory.snapshot as snapshot, os, signal
link = RemoteKeeperLink(sys.argv[1], credentials=Credentials(secret="s3cret"), timeout_s=5.0)
tag = Tag(job="job", term=1, generation=2)
def ask(step):
    key = RecordKey(layer=0, expert=1, step=step, generation=2, routed=1)
    item = SnapshotItem(key=key, tensors=ToyState().expert(0, 1, step))
    return SnapshotRequest(tag=tag, step=step, items=(item,), url="", published_step=step - 1)
snapshotter = Snapshotter(link)
assert snapshotter.begin(ask(7))
assert link.next_report(20)["ok"]
if sys.argv[2] == "torn":
    def torn(target, layout, tensors):
        target[:64] = b"x" * 64
        os.kill(os.getpid(), signal.SIGKILL)
    snapshot.fill_image = torn
    snapshotter.begin(ask(8))
    threading.Event().wait()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("moment", ["sealed", "torn"])
def test_a_snapshot_outlives_a_trainer_killed_at_any_moment(start: Start, moment: str) -> None:
    keeper = start()
    died = subprocess.run([sys.executable, "-c", TRAINER, keeper.address, moment], timeout=60)
    assert died.returncode == -signal.SIGKILL
    stock = client(keeper).inventory()
    assert [k.step for k in stock.keys] == [7]
    _, image = client(keeper).fetch(layer=0, expert=1, generation=2, step=7)
    assert_same(tensors_of(image, where="test"), TOY.expert(0, 1, 7))
    trainer = Trainer(keeper)
    for step in (9, 10, 11):
        trainer.take(request(step, [(0, 1)], published=step - 1))
    assert [k.step for k in client(keeper).inventory().keys] == [10, 11]
    trainer.close()


def test_a_damaged_copy_is_refused_by_the_receiver(start: Start) -> None:
    keeper = start()
    key = RecordKey(layer=0, expert=1, step=7, generation=2)
    with pytest.raises(RefusedError, match="checksum differs"):
        client(keeper).push(key, memoryview(b"x" * 100), checksum="0" * 32, published_step=0)
    assert client(keeper).inventory().keys == ()


def test_the_keeper_process_does_not_import_torch() -> None:
    code = "import sys, lazarus.runtime.keeper.service; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_grpc_metadata_is_the_only_way_in(start: Start) -> None:
    channel = grpc.insecure_channel(start().address)
    leave = codec.encode(Order(stamp=TAG, leave=True))
    with pytest.raises(grpc.RpcError) as refused:
        channel.unary_unary(method(KEEPER, "Tell"))(leave, timeout=5)
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    channel.close()


def test_with_tls_nobody_connects_in_the_clear(start: Start, tmp_path: Path) -> None:
    credentials = make_pair(tmp_path, "IP:127.0.0.1").credentials(SECRET)
    first, second = start(credentials=credentials), start(credentials=credentials)
    with pytest.raises(KeeperUnavailableError):
        client(first).inventory()
    link = RemoteKeeperLink(first.address, credentials=credentials, timeout_s=5.0)
    snapshotter = Snapshotter(link)
    assert snapshotter.begin(request(7, [(0, 1)], copy_to=(second.address,)))
    assert all(r is not None and r["ok"] for r in (link.next_report(20), link.next_report(20)))
    other = KeeperClient(second.address, credentials=credentials, tag=TAG, timeout_s=30.0)
    assert other.inventory().keys[0].step == 7
    snapshotter.close()
    link.close()


def test_a_stopped_keeper_costs_a_moment_and_serves_again_when_it_goes_on(start: Start) -> None:
    keeper = start()
    link = RemoteKeeperLink(keeper.address, credentials=Credentials(secret=SECRET), timeout_s=0.5)
    snapshotter = Snapshotter(link, patience_s=0.05)
    assert snapshotter.begin(request(1, [(0, 0)]))
    assert link.next_report(20)
    keeper.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, keeper.process.pid, os.WSTOPPED)  # every thread of it stands
    assert snapshotter.begin(request(2, [(0, 0)]))
    assert snapshotter.wait_before_apply() < 0.4
    report = link.next_report(20)
    assert report is not None
    assert not report["ok"]
    keeper.process.send_signal(signal.SIGCONT)
    link.close()
    trainer = Trainer(keeper)  # the same process attaches again: its abandoned slots are free
    before = client(keeper).inventory().reserved_bytes
    for step in range(3, 9):
        trainer.take(request(step, [(0, 0)], published=step - 1))
    assert [k.step for k in client(keeper).inventory().keys][-1] == 8
    assert client(keeper).inventory().reserved_bytes == before
    snapshotter.close()
    trainer.close()


def test_a_keeper_that_hangs_while_it_starts_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for its port without end."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 600\n")
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))
    config = KeeperConfig(job="job", credentials=Credentials(secret=SECRET), silent_s=0.1)
    with pytest.raises(KeeperUnavailableError, match="did not start"):
        start_keeper(config)
