"""The controller's end of the streams to the workers and the driver.

Invalid bytes, and hellos that this run could never admit, are answered here and reported to the
controller's loop as ``Garbled`` events; nothing that a peer sends ends a thread.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
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

_KEPT = 4096  # newest messages to the driver, sent again where a broken stream lost them
_LOOK_S = 0.1  # between two looks whether the driver's process is still there


class Peer:
    """One stream: its outgoing messages, and whether its incoming messages are accepted.

    ``is_broken`` means that the stream ended without a word of the peer.
    """

    def __init__(self) -> None:
        self.outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.is_closed = False
        self.is_broken = False
        self.is_heard = False

    def messages(self) -> Iterator[bytes]:
        """Yield outgoing messages, waiting for each, until ``close``."""
        while (message := self.outbox.get()) is not None:
            yield message

    def close(self) -> None:
        """End the stream after the messages that are queued."""
        self.outbox.put(None)


Heard = tuple[Event, Peer | None]  # an event, and the stream of a worker's message


class Streams:
    """The streams of the workers, one each, and of the driver. Any thread may send.

    A driver whose stream breaks is expected back, and then hears what the broken stream lost.
    ``driver_there`` is clear before the first stream of the driver, and while it is expected back.

    Args:
        config: The controller's configuration, which a worker's hello must match.
        term: The controller's term.
        post: Called with each event, from the threads of the streams.
        on_death: Called if one of these threads dies.
        is_driver_dead: Whether the driver's process is known to have ended.
    """

    def __init__(
        self,
        config: ControlConfig,
        *,
        term: int,
        post: Callable[[Heard], None],
        on_death: OnDeath,
        is_driver_dead: Callable[[], bool] = lambda: False,
    ) -> None:
        self._config, self._term = config, term
        self._post, self._on_death = post, on_death
        self._is_driver_dead = is_driver_dead
        self._lock = threading.Lock()
        self._peers: dict[str, Peer] = {}
        self._driver: Peer | None = None
        self._number = 0  # of the newest message to the driver
        self._told: deque[tuple[int, bytes]] = deque(maxlen=_KEPT)
        self.driver_there = threading.Event()

    # ---- in ------------------------------------------------------------------------------------

    def attach(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        """Serve a worker's stream, which begins with the worker's hello."""
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
        """Serve the driver's stream."""
        first = self._first(FromDriver, DriverHello, requests, context)
        peer = Peer()
        heard = first.heard if first.term == self._term else 0
        with self._lock:
            older, self._driver = self._driver, peer
            for number, message in self._told:
                if number > heard:
                    peer.outbox.put(message)
            self.driver_there.set()
        if older is not None:
            older.close()
        _close_with(context, peer)
        self._post((DriverSaid(body=first, at_s=now_s()), None))
        spawn("read-driver", self._read_driver, requests, peer, on_death=self._on_death)
        return peer.messages()

    def _first(self, kind: Any, wanted: type[Any], requests: Iterator[bytes], context: Any) -> Any:
        """The first message of a stream; a stream that begins with another one is refused."""
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
        for body in self._bodies(FromWorker, requests, name, peer):
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
        for body in self._bodies(FromDriver, requests, "driver", peer):
            self._post((DriverSaid(body=body, at_s=now_s()), None))
        peer.close()
        with self._lock:
            if self._driver is not peer:
                return
            self._driver = None
            if peer.is_broken:
                self.driver_there.clear()
        if not peer.is_broken or not self._driver_returns():
            self._post((DriverGone(at_s=now_s()), None))

    def _driver_returns(self) -> bool:
        """Wait for the driver's next stream; False if its process is gone or it stays away."""
        until_s = now_s() + self._config.timeouts.driver_away_s
        while not self.driver_there.wait(_LOOK_S):
            if now_s() < until_s and not self._is_driver_dead():
                continue
            with self._lock:
                self.driver_there.set()  # nobody waits for it from now on
                return self._driver is not None
        return True

    def _bodies(
        self, kind: Any, requests: Iterator[bytes], name: str, peer: Peer
    ) -> Iterator[Body]:
        """The messages of a stream, until it breaks or ends."""
        try:
            for data in requests:
                try:
                    body = codec.decode(kind, data).body
                except ValueError as problem:
                    self._garbled(name, str(problem))
                    continue
                yield body
        except grpc.RpcError:
            peer.is_broken = True  # the caller reports the end of the stream

    # ---- who is heard --------------------------------------------------------------------------

    def admit(self, name: str, peer: Peer) -> None:
        """Make this the worker's stream and close an older one (rule 37 of docs/protocol.md)."""
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
        """Send to a worker; dropped if its stream is closed, which is reported as an event."""
        with self._lock:
            peer = self._peers.get(worker)
        if peer is not None:
            tell_peer(peer, body, term=term)

    def disconnect(self, worker: str) -> None:
        """End a worker's stream after the messages that are queued."""
        with self._lock:
            peer = self._peers.get(worker)
        if peer is not None:
            peer.close()

    def tell_driver(self, body: Body) -> None:
        """Send to the driver, at once or when it connects; again if a stream breaks meanwhile."""
        with self._lock:
            self._number += 1
            said = ToDriver(cast(Any, body), term=self._term, number=self._number)
            message = codec.encode(said)
            self._told.append((self._number, message))
            if self._driver is not None:
                self._driver.outbox.put(message)

    def pulse(self, message: bytes) -> None:
        """Send a pulse to the driver; dropped if the driver is not connected."""
        with self._lock:
            if self._driver is not None:
                self._driver.outbox.put(message)

    def hang_up(self) -> None:
        """End every stream after the messages that are queued."""
        with self._lock:
            peers = [*self._peers.values(), *([] if self._driver is None else [self._driver])]
        for peer in peers:
            peer.close()


def _close_with(context: Any, peer: Peer) -> None:
    """Close the peer when the call ends, so that its sender stops waiting for messages."""
    if not context.add_callback(peer.close):
        peer.close()


def tell_peer(peer: Peer, body: Body, *, term: int) -> None:
    """Send to a worker over a given stream, admitted or not."""
    peer.outbox.put(codec.encode(ToWorker(cast(Any, body), term=term)))
