"""A process's stream to the controller: sends in order, hands commands over, comes back."""

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
    """One bidirectional stream, reopened until ``allowance_s`` without a controller has passed."""

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
        self._alone_since: float | None = None  # monotonic; None while a controller answers
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = spawn("control", self._run, on_death=self._died)

    def _died(self, name: str, problem: BaseException) -> None:
        """Nobody would hear the controller any more, nor miss it: to the owner it is gone."""
        say_so(name, problem)
        self._on_dead(f"thread {name} died: {type(problem).__name__}: {problem}")

    def send(self, body: Body) -> None:
        """Queue a message; lost if the stream breaks before it goes out (hello says all again)."""
        message = self._encoded(body)
        with self._lock:
            self._outbox.put(message)

    def close(self, *, timeout_s: float = 5.0) -> None:
        """Let queued messages go, then end the stream."""
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
        """One stream, from hello to its end."""
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
        else:
            self._on_message(0, codec.decode(ToDriver, data).body)
