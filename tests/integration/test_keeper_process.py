"""The keeper's process: who reaches it, how it ends, and what outlives its trainer."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from certificates import make_pair
from keepers import (
    SECRET,
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
from lazarus.checkpoint.files.store import RecordKey
from lazarus.checkpoint.files.tensors import tensors_of
from lazarus.checkpoint.in_memory.snapshot import Snapshotter
from lazarus.runtime.keeper.client import KeeperClient
from lazarus.runtime.keeper.process import KeeperConfig, start_keeper
from lazarus.runtime.keeper.trainer_link import RemoteKeeperLink
from lazarus.runtime.rpc import codec
from lazarus.runtime.rpc.channel import KEEPER, method
from lazarus.runtime.rpc.credentials import Credentials
from lazarus.runtime.rpc.keeper_messages import Order


@pytest.fixture
def start() -> Iterator[Start]:
    with keepers() as begin:
        yield begin


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
