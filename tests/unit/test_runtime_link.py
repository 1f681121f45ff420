"""The control stream: no secret, no entry; what breaks comes back; nothing listens outside."""

from __future__ import annotations

import os
import queue
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from lazarus.control.messages import Body, FromWorker, Hello, ToWorker, Welcome
from lazarus.runtime.controller.rendezvous import RendezvousStore
from lazarus.runtime.rpc import codec
from lazarus.runtime.rpc import link as linking
from lazarus.runtime.rpc.channel import add_control, bind, make_server
from lazarus.runtime.rpc.credentials import Credentials
from lazarus.runtime.rpc.link import Link

Heard = queue.SimpleQueue[tuple[int, Body]]


class Greeter:
    """Welcomes every message and keeps what it hears."""

    def __init__(self) -> None:
        self.heard: queue.SimpleQueue[Body] = queue.SimpleQueue()

    def attach(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        for data in requests:
            self.heard.put(codec.decode(FromWorker, data).body)
            yield codec.encode(ToWorker(Welcome(node=4), term=1))


def serve(secret: str, *, port: int = 0) -> tuple[grpc.Server, int, Greeter]:
    greeter = Greeter()
    server = make_server(Credentials(secret=secret), max_streams=4)
    add_control(server, attach=greeter.attach, drive=greeter.attach)
    port = bind(server, f"127.0.0.1:{port}", Credentials(secret=secret))
    server.start()
    return server, port, greeter


def attach(
    port: int, secret: str, *, allowance_s: float = 30.0, dead: Callable[[str], None] = print
) -> tuple[Link, Heard]:
    heard: Heard = queue.SimpleQueue()
    link = Link(
        f"127.0.0.1:{port}",
        credentials=Credentials(secret=secret),
        speaker=FromWorker,
        hello=lambda: Hello(worker="node-0.0", node_key="node-0"),
        on_message=lambda term, body: heard.put((term, body)),
        on_dead=dead,
        allowance_s=allowance_s,
    )
    link.start()
    return link, heard


def test_hello_comes_first_and_messages_come_in_order() -> None:
    server, port, greeter = serve("s3cret")
    link, heard = attach(port, "s3cret")
    assert heard.get(timeout=20) == (1, Welcome(node=4))
    for name in "01234":
        link.send(Hello(worker=name, node_key=""))
    said = [greeter.heard.get(timeout=20) for _ in range(6)]
    assert [body.worker for body in said if isinstance(body, Hello)] == ["node-0.0", *"01234"]
    link.close()
    server.stop(0).wait()


@pytest.mark.parametrize("secret", ["wrong", "", "s3cre"])
def test_a_wrong_secret_is_refused_at_once_and_nothing_is_heard(secret: str) -> None:
    server, port, greeter = serve("s3cret")
    died: queue.SimpleQueue[str] = queue.SimpleQueue()
    link, heard = attach(port, secret, dead=died.put)
    assert "UNAUTHENTICATED" in died.get(timeout=20)
    assert heard.empty() and greeter.heard.empty()
    link.close()
    server.stop(0).wait()


def test_a_stream_that_broke_comes_back_with_a_new_hello() -> None:
    server, port, _ = serve("s3cret")
    link, heard = attach(port, "s3cret")
    heard.get(timeout=20)
    server.stop(0).wait()
    server, _, greeter = serve("s3cret", port=port)
    assert heard.get(timeout=30) == (1, Welcome(node=4))
    assert isinstance(greeter.heard.get(timeout=20), Hello)
    link.close()
    server.stop(0).wait()


def test_without_a_controller_the_allowance_ends_the_wait() -> None:
    server, port, _ = serve("s3cret")
    server.stop(0).wait()
    died: queue.SimpleQueue[str] = queue.SimpleQueue()
    link, _ = attach(port, "s3cret", allowance_s=0.2, dead=died.put)
    assert "no controller" in died.get(timeout=30)
    link.close()


def test_an_outage_that_is_over_is_forgiven(monkeypatch: pytest.MonkeyPatch) -> None:
    """The allowance counts one outage, not the time since the first ever."""
    clock = [0.0]
    monkeypatch.setattr(linking.time, "monotonic", lambda: clock[0])
    died: queue.SimpleQueue[str] = queue.SimpleQueue()
    server, port, _ = serve("s3cret")
    link, heard = attach(port, "s3cret", allowance_s=50.0, dead=died.put)
    for _ in range(3):
        heard.get(timeout=30)
        clock[0] += 40.0
        server.stop(0).wait()
        server, _, _ = serve("s3cret", port=port)
    heard.get(timeout=30)
    assert died.empty()
    link.close()
    server.stop(0).wait()


def test_nothing_listens_beyond_loopback() -> None:
    before = listening()
    server, port, _ = serve("s3cret")
    store = RendezvousStore("127.0.0.1", timeout_s=5).open()
    opened = listening() - before
    assert {int(store.address.rpartition(":")[2]), port} <= {at for _, at in opened}
    mapped = "0000000000000000FFFF00000100007F"  # the same, as an IPv6 socket shows it
    assert {address for address, _ in opened} <= {"0100007F", mapped}
    server.stop(0).wait()


def listening() -> set[tuple[str, int]]:
    """(hex address, port) of this process's own listening sockets."""
    own = set()
    for path in Path("/proc/self/fd").iterdir():
        try:
            own.add(os.readlink(path).removeprefix("socket:[").rstrip("]"))
        except OSError:
            continue
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in own:
                address, port = fields[1].split(":")
                found.add((address, int(port, 16)))
    return found
