"""Real services under bytes that are no messages: they answer, stay alive, and do not grow."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import grpc
import pytest
import xxhash
from odd_bytes import odd_bytes
from odd_messages import BODIES, odd_body

from lazarus.checkpoint.errors import RefusedError
from lazarus.checkpoint.files.store import RecordKey, Tag
from lazarus.config.timeouts import derive_timeouts
from lazarus.control.cluster.state import ControlConfig
from lazarus.control.messages import (
    FromDriver,
    FromWorker,
    Hello,
    Suspicion,
    ToWorker,
    UserError,
    Welcome,
)
from lazarus.control.restart.replay import initial_state
from lazarus.record.events import read_events
from lazarus.runtime.keeper.client import KeeperClient
from lazarus.runtime.keeper.process import KeeperConfig, KeeperProcess, start_keeper
from lazarus.runtime.launch.launcher import ProcessLauncher
from lazarus.runtime.rpc import codec
from lazarus.runtime.rpc.channel import CONTROL, KEEPER, metadata_of, method, open_channel
from lazarus.runtime.rpc.credentials import Credentials
from lazarus.runtime.rpc.keeper_messages import (
    Abandon,
    Drop,
    FetchRequest,
    InventoryRequest,
    Order,
    RecordHead,
    Reserve,
    Seal,
    Target,
)
from lazarus.runtime.spec import ControllerSpec

JOB = Credentials(secret="s3cret")
MEBI = 1 << 20
MANY = pytest.param(20_000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])
TAG = Tag(job="job", term=1, generation=2)
KEY = RecordKey(layer=0, expert=1, step=7, generation=2)


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


# ---- the controller ----------------------------------------------------------------------------


def converse(address: str, name: str, sent: list[bytes]) -> list[bytes]:
    """One stream with these messages; what was answered until it ended or fell silent."""
    with open_channel(address, JOB) as channel:
        call = channel.stream_stream(method(CONTROL, name))(
            iter(sent), metadata=metadata_of(JOB), timeout=30
        )
        try:
            return list(call)
        except grpc.RpcError:
            return []


def is_welcome(address: str, name: str) -> bool:
    """Whether a worker that says what it should is admitted."""
    outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    hello = Hello(worker=f"{name}.0", node_key=name)
    outbox.put(codec.encode(FromWorker(hello)))
    with open_channel(address, JOB) as channel:
        start = channel.stream_stream(method(CONTROL, "Attach"))
        call = start(iter(outbox.get, None), metadata=metadata_of(JOB), timeout=60)
        answer = codec.decode(ToWorker, next(call)).body
        outbox.put(None)
        call.cancel()
    return isinstance(answer, Welcome)


@pytest.mark.parametrize("messages", [600, MANY])
def test_no_bytes_break_the_controller_or_make_it_grow(tmp_path: Path, messages: int) -> None:
    """C9: raw and bent messages on the real streams; a good hello is welcome after all of them."""
    ended: list[str] = []
    launcher = ProcessLauncher(lambda name, cause: ended.append(f"{name}: {cause}"))
    config = ControlConfig(
        steps=50, nodes=3, timeouts=replace(derive_timeouts(10.0), startup_s=3600.0)
    )
    spec = ControllerSpec(
        host="127.0.0.1", port=0, credentials=JOB, run_dir=tmp_path, config=config
    )
    try:
        port = launcher.start_controller(spec, timeout_s=120)
        pid = launcher.pid_of("controller")
        assert pid is not None
        address, rng = f"127.0.0.1:{port}", Random(5)
        state = initial_state(config, term=1, now_s=0.0)
        sizes: list[int] = []
        for number in range(messages // 40):
            hello = codec.encode(FromWorker(Hello(worker=f"x{number}.0", node_key=f"x{number}")))
            bodies = [b for b in (odd_body(rng, state, ()) for _ in range(45)) if not _ends(b)]
            encoded = [_as_sent(body) for body in bodies]
            sent = [odd_bytes(rng, data) if rng.random() < 0.5 else data for data in encoded]
            converse(address, "Attach", [hello, *sent] if rng.random() < 0.8 else sent)
            sizes.append(resident(pid))
        assert is_welcome(address, "good")
        assert not ended
        warm = sizes[max(10, len(sizes) // 5)]  # gRPC's threads and buffers are there by then
        assert max(sizes) - warm < 24 * MEBI
    finally:
        launcher.close(grace_s=0.0)
    record = read_events(tmp_path / "events.jsonl")
    assert 10 < sum(event["event"] == "message_refused" for event in record) <= 20


def _ends(body: object) -> bool:
    """Whether a run that has not begun ends with it, and rightly so."""
    return isinstance(body, UserError | Suspicion)


def _as_sent(body: object) -> bytes:
    """Any body in a worker's envelope, also those that no worker says."""
    envelope = FromDriver if type(body) not in BODIES else FromWorker
    return codec.encode(envelope(body))  # type: ignore[arg-type]


# ---- the keeper --------------------------------------------------------------------------------


@pytest.fixture
def keeper() -> Iterator[KeeperProcess]:
    started = start_keeper(KeeperConfig(job="job", credentials=JOB, silent_s=30.0))
    yield started
    started.stop()


GOOD = {
    "Attach": [
        Reserve(ticket=1, stamp=TAG, keys=(KEY, KEY), num_bytes=(100, 5000)),
        Seal(ticket=1, copies=(Target(index=0, addresses=("127.0.0.1:1",)),), persist=(1,)),
        Abandon(ticket=1),
    ],
    "Push": [RecordHead(stamp=TAG, key=KEY, num_bytes=100, checksum="0")],
    "Fetch": [FetchRequest(stamp=TAG, layer=0, expert=1, generation=2, step=7)],
    "Inventory": [InventoryRequest(stamp=TAG)],
    "Tell": [
        Order(stamp=TAG, lineage=((1, 0),), drops=(Drop(layer=0, expert=1, generation=2, step=7),))
    ],
}


def call_keeper(channel: grpc.Channel, name: str, sent: list[bytes]) -> None:
    """One call with these bytes, whatever comes of it."""
    path, more = method(KEEPER, name), {"metadata": metadata_of(JOB), "timeout": 20}
    try:
        if name == "Attach":
            list(channel.stream_stream(path)(iter(sent), **more))
        elif name == "Push":
            channel.stream_unary(path)(iter(sent), **more)
        elif name == "Fetch":
            list(channel.unary_stream(path)(sent[0], **more))
        else:
            channel.unary_unary(path)(sent[0], **more)
    except grpc.RpcError as refused:
        if refused.code() is grpc.StatusCode.UNKNOWN:  # an exception left the service
            raise AssertionError(f"{name}: {refused.details()}") from refused


@pytest.mark.parametrize("messages", [1000, MANY])
def test_no_bytes_break_a_keeper_or_make_it_grow(keeper: KeeperProcess, messages: int) -> None:
    """C9: raw and bent messages to every method; whoever comes after them is served."""
    rng, pid = Random(6), keeper.process.pid
    data = image(8)
    good = KeeperClient(keeper.address, credentials=JOB, tag=TAG, timeout_s=20)
    key = RecordKey(layer=0, expert=0, step=7, generation=2)
    good.push(key, memoryview(data), checksum=xxhash.xxh3_128_hexdigest(data), published_step=0)
    sizes: list[int] = []
    with open_channel(keeper.address, JOB) as channel:
        for _ in range(messages // 4):
            name = rng.choice(sorted(GOOD))
            sent = [odd_bytes(rng, codec.encode(rng.choice(GOOD[name]))) for _ in range(4)]
            call_keeper(channel, name, sent)
            sizes.append(resident(pid))
    assert keeper.process.poll() is None
    assert max(sizes) - sizes[len(sizes) // 5] < 24 * MEBI
    assert is_served(keeper)


def is_served(keeper: KeeperProcess) -> bool:
    """Whether somebody of a newer generation, a bent one may have come by, is answered."""
    for leap in range(1, 64):
        tag = Tag(job="job", term=leap << 20, generation=leap << 20)
        client = KeeperClient(keeper.address, credentials=JOB, tag=tag, timeout_s=20)
        try:
            return client.inventory().pid == keeper.process.pid
        except RefusedError:
            continue
        finally:
            client.close()
    return False


def image(floats: int) -> bytes:
    """A record as ``KEY``'s neighbour, expert 0, would be."""
    import torch

    from lazarus.checkpoint.files.tensors import record_of

    key = RecordKey(layer=0, expert=0, step=7, generation=2)
    record = record_of(key, {"w": torch.zeros(floats)}, tag=TAG)
    return b"".join(bytes(chunk) for chunk in record.chunks)


@pytest.mark.parametrize("claimed", [512 << 30, 4 << 30, 1 << 20])
def test_a_push_of_ten_bytes_that_claims_more_takes_no_memory(
    keeper: KeeperProcess, claimed: int
) -> None:
    """E6: refused, nothing resident, and the limit has as much room as before."""
    client = KeeperClient(keeper.address, credentials=JOB, tag=TAG, timeout_s=20)
    before, reserved = resident(keeper.process.pid), client.inventory().reserved_bytes
    for _ in range(5):
        head = RecordHead(stamp=TAG, key=KEY, num_bytes=claimed, checksum="0")
        with open_channel(keeper.address, JOB) as channel:
            push = channel.stream_unary(method(KEEPER, "Push"))
            answer = push(
                iter([codec.encode(head), b"0123456789"]),
                metadata=metadata_of(JOB),
                timeout=20,
            )
        assert b"full" in answer or b"10 of" in answer
    stock = client.inventory()
    assert resident(keeper.process.pid) - before < 8 * MEBI
    assert stock.reserved_bytes == reserved and stock.keys == ()
    client.close()


def test_a_limit_that_was_given_holds(tmp_path: Path) -> None:
    """E6: a keeper takes no more than its limit, however it is asked."""
    started = start_keeper(
        KeeperConfig(job="job", credentials=JOB, limit_bytes=MEBI, silent_s=30.0)
    )
    try:
        client = KeeperClient(started.address, credentials=JOB, tag=TAG, timeout_s=20)
        data = image(MEBI)
        key = RecordKey(layer=0, expert=0, step=7, generation=2)
        with pytest.raises(RefusedError, match="snapshot memory is full"):
            client.push(key, memoryview(data), checksum="0", published_step=0)
        assert client.inventory().peak_bytes == 0
        client.close()
    finally:
        started.stop()
