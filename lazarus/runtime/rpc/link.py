"""A process's stream to the controller: sends messages in order, and reconnects when it breaks."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import grpc

from lazarus.basics.threads import say_so, spawn
from lazarus.control.messages import Body, FromDriver, FromWorker, ToDriver, ToWorker
from lazarus.runtime.rpc import codec
from lazarus.runtime.rpc.channel import CONTROL, metadata_of, method, open_channel
from lazarus.runtime.rpc.credentials import Credentials

_BACKOFF_S = 0.05


class Link:
    """A bidirectional stream to the controller, reopened whenever it breaks.

    Args:
        address: The controller's "host:port".
        credentials: The job's credentials.
        speaker: ``FromWorker`` or ``FromDriver``: the class that wraps outgoing messages.
        hello: Makes the first message of each stream.
        on_message: Called with the controller's term and each message.
        on_dead: Called with the reason when the link gives up.
        allowance_s: Time without an answering controller after which the link gives up.
        on_connect: Called each time before a stream is opened; may call ``send``.
    """

    def __init__(
        self,
        address: str,
        *,
        credentials: Credentials,
        speaker: type[FromWorker] | type[FromDriver],
        hello: Callable[[], Body],
        on_message: Callable[[int, Body], None],
        on_dead: Callable[[str], None],
        allowance_s: float,
        on_connect: Callable[[], None] = lambda: None,
    ) -> None:
        self._address = address
        self._credentials = credentials
        self._speaker = speaker
        self._hello = hello
        self._on_message = on_message
        self._on_dead = on_dead
        self._allowance_s = allowance_s
        self._on_connect = on_connect
        self._lock = threading.Lock()
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._alone_since: float | None = None  # monotonic s; None while a controller answers
        self._thread: threading.Thread | None = None
        self.heard = (0, 0)  # term and number of the newest numbered message

    def start(self) -> None:
        """Begin to connect, in a thread of its own."""
        self._thread = spawn("control", self._run, on_death=self._died)

    def _died(self, name: str, problem: BaseException) -> None:
        """Report the controller as dead, because this thread no longer hears it."""
        say_so(name, problem)
        self._on_dead(f"thread {name} died: {type(problem).__name__}: {problem}")

    def send(self, body: Body) -> None:
        """Queue a message. It is lost if the stream breaks first; the next hello replaces it."""
        message = self._encoded(body)
        with self._lock:
            self._outbox.put(message)

    def close(self, *, timeout_s: float = 5.0) -> None:
        """Send the queued messages, then end the stream; waits up to ``timeout_s``."""
        self._closed.set()
        with self._lock:
            self._outbox.put(None)
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout_s)

    def _encoded(self, body: Body) -> bytes:
        return codec.encode(self._speaker(cast(Any, body)))

    def _messages(self, outbox: queue.SimpleQueue[bytes | None]) -> Iterator[bytes]:
        while (message := outbox.get()) is not None:
            yield message

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                self._converse()
                reason = "stream ended"
            except grpc.RpcError as problem:
                code = problem.code()
                reason = f"{code.name}: {problem.details()}"
                if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
                    self._on_dead(reason)
                    return
            except ValueError as problem:
                reason = f"a message from the controller: {problem}"
            if self._closed.is_set():
                return
            now = time.monotonic()
            if self._alone_since is None:
                self._alone_since = now
            if now - self._alone_since > self._allowance_s:
                self._on_dead(f"no controller for {self._allowance_s:.0f} s ({reason})")
                return
            self._closed.wait(_BACKOFF_S)

    def _converse(self) -> None:
        """Open one stream and handle its messages until it ends."""
        with self._lock:
            self._outbox = queue.SimpleQueue()
            outbox = self._outbox
            outbox.put(self._encoded(self._hello()))
        self._on_connect()
        with open_channel(self._address, self._credentials) as channel:
            name = "Attach" if self._speaker is FromWorker else "Drive"
            start = channel.stream_stream(method(CONTROL, name))
            call = start(self._messages(outbox), metadata=metadata_of(self._credentials))
            try:
                for data in call:
                    self._alone_since = None
                    self._hear(data)
            finally:
                outbox.put(None)
                call.cancel()

    def _hear(self, data: bytes) -> None:
        if self._speaker is FromWorker:
            ordered = codec.decode(ToWorker, data)
            self._on_message(ordered.term, ordered.body)
            return
        said = codec.decode(ToDriver, data)
        self._on_message(said.term, said.body)
        if said.number:
            self.heard = (said.term, said.number)
