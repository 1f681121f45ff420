"""The controller's ends of all streams: who may speak, what comes in, what goes out.

Bytes that are no message, and hellos that no run could admit, are answered here and told to the
consumer as news; nothing that a peer sends ends a thread.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, cast

import grpc

from lazarus.basics.clock import now_s
from lazarus.basics.threads import OnDeath, spawn
from lazarus.control.cluster.state import ControlConfig
from lazarus.control.membership.checks import wrong_hello
from lazarus.control.messages import (
    Body,
    DriverHello,
    Fenced,
    FromDriver,
    FromWorker,
    Hello,
    ToDriver,
    ToWorker,
)
from lazarus.control.ports import DriverGone, DriverSaid, Event, Garbled, StreamClosed, WorkerSaid
from lazarus.runtime.rpc import codec


class Peer:
    """One stream: its outgoing half, and whether what it says is heard."""

    def __init__(self) -> None:
        self.outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.is_closed = False
        self.is_heard = False

    def messages(self) -> Iterator[bytes]:
        while (message := self.outbox.get()) is not None:
            yield message

    def close(self) -> None:
        """End the stream behind what is queued in it."""
        self.outbox.put(None)


Heard = tuple[Event, Peer | None]  # a worker's message comes with its stream


class Streams:
    """Streams of the workers, one each, and of the driver. Any thread may speak to any of them.

    Args:
        post: Takes what comes in, from the threads of the streams.
        on_death: Hears of an error in one of these threads.
    """

    def __init__(
        self, config: ControlConfig, *, post: Callable[[Heard], None], on_death: OnDeath
    ) -> None:
        self._config = config
        self._post, self._on_death = post, on_death
        self._lock = threading.Lock()
        self._peers: dict[str, Peer] = {}
        self._driver: Peer | None = None
        self._for_driver: list[bytes] = []  # until it is (back) there
        self.driver_there = threading.Event()

    # ---- in ------------------------------------------------------------------------------------

    def attach(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        """Answer a worker's stream: its hello says who speaks."""
        first = self._first(FromWorker, Hello, requests, context)
        peer = Peer()
        if reason := wrong_hello(self._config, first):
            self._garbled(first.worker, reason, message="Hello")
            peer.outbox.put(codec.encode(ToWorker(Fenced(reason=reason))))
            peer.close()
            return peer.messages()
        name = first.worker
        _close_with(context, peer)
        self._post((WorkerSaid(worker=name, body=first, at_s=now_s()), peer))
        spawn(f"read-{name}", self._read_worker, requests, name, peer, on_death=self._on_death)
        return peer.messages()

    def drive(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        """Answer the driver's stream."""
        first = self._first(FromDriver, DriverHello, requests, context)
        peer = Peer()
        with self._lock:
            self._driver = peer
            for message in self._for_driver:
                peer.outbox.put(message)
            self._for_driver.clear()
        self.driver_there.set()
        _close_with(context, peer)
        self._post((DriverSaid(body=first, at_s=now_s()), None))
        spawn("read-driver", self._read_driver, requests, peer, on_death=self._on_death)
        return peer.messages()

    def _first(self, kind: Any, wanted: type[Any], requests: Iterator[bytes], context: Any) -> Any:
        """The message that opens a stream; whoever opens it otherwise is refused."""
        try:
            body = codec.decode(kind, next(requests)).body
        except (ValueError, StopIteration, grpc.RpcError) as problem:
            body, reason = None, str(problem) or "the stream ended before its first message"
        else:
            reason = f"a stream begins with {wanted.__name__}, not {type(body).__name__}"
        if not isinstance(body, wanted):
            self._garbled("", reason)
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, reason)
        return body

    def _garbled(self, worker: str, reason: str, *, message: str = "bytes") -> None:
        garbled = Garbled(worker=worker, reason=reason, message=message, at_s=now_s())
        self._post((garbled, None))

    def _read_worker(self, requests: Iterator[bytes], name: str, peer: Peer) -> None:
        for body in self._bodies(FromWorker, requests, name):
            self._post((WorkerSaid(worker=name, body=body, at_s=now_s()), peer))
        peer.close()
        with self._lock:
            peer.is_closed = True
            current = self._peers.get(name) is peer
            if current:
                del self._peers[name]
        if current:
            self._post((StreamClosed(worker=name, at_s=now_s()), None))

    def _read_driver(self, requests: Iterator[bytes], peer: Peer) -> None:
        for body in self._bodies(FromDriver, requests, "driver"):
            self._post((DriverSaid(body=body, at_s=now_s()), None))
        peer.close()
        if self._driver is peer:
            self._post((DriverGone(at_s=now_s()), None))

    def _bodies(self, kind: Any, requests: Iterator[bytes], name: str) -> Iterator[Body]:
        """What a stream brings, until it breaks or ends."""
        try:
            for data in requests:
                try:
                    body = codec.decode(kind, data).body
                except ValueError as problem:
                    self._garbled(name, str(problem))
                    continue
                yield body
        except grpc.RpcError:
            return  # the peer is gone, which its end says

    # ---- who is heard --------------------------------------------------------------------------

    def admit(self, name: str, peer: Peer) -> None:
        """From now on this stream is the worker's; an older one is over (rule 37)."""
        with self._lock:
            older, self._peers[name] = self._peers.get(name), peer
            peer.is_heard = True
            gone = peer.is_closed
            if gone:
                del self._peers[name]
        if older is not None:
            older.is_heard = False
            older.close()
        if gone:
            self._post((StreamClosed(worker=name, at_s=now_s()), None))

    # ---- out -----------------------------------------------------------------------------------

    def tell(self, worker: str, body: Body, *, term: int) -> None:
        """Send to a worker; nothing, if its stream is closed: the news of that is on its way."""
        with self._lock:
            peer = self._peers.get(worker)
        if peer is not None:
            tell_peer(peer, body, term=term)

    def disconnect(self, worker: str) -> None:
        with self._lock:
            peer = self._peers.get(worker)
        if peer is not None:
            peer.close()

    def tell_driver(self, body: Body) -> None:
        """Send to the driver, or keep it until it is back."""
        message = codec.encode(ToDriver(cast(Any, body)))
        with self._lock:
            if self._driver is not None:
                self._driver.outbox.put(message)
            else:
                self._for_driver.append(message)

    def pulse(self, message: bytes) -> None:
        """To a driver that is there; one that is not needs no old pulses."""
        with self._lock:
            if self._driver is not None:
                self._driver.outbox.put(message)

    def hang_up(self) -> None:
        """End every stream, behind what is queued in it."""
        with self._lock:
            peers = [*self._peers.values(), *([] if self._driver is None else [self._driver])]
        for peer in peers:
            peer.close()


def _close_with(context: Any, peer: Peer) -> None:
    """The stream's sender waits for messages: let it go when the call is over."""
    if not context.add_callback(peer.close):
        peer.close()


def tell_peer(peer: Peer, body: Body, *, term: int) -> None:
    """Send to a worker that is admitted, or will not be."""
    peer.outbox.put(codec.encode(ToWorker(cast(Any, body), term=term)))
