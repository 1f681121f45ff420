"""A rank's stream to its node's keeper: sends reservations, receives memory and reports."""

from __future__ import annotations

import json
import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grpc

from lazarus.basics.threads import say_so, spawn
from lazarus.checkpoint.errors import KeeperUnavailableError, RefusedError
from lazarus.checkpoint.files.store import RecordKey, Tag
from lazarus.checkpoint.in_memory.arena import MappedSegments
from lazarus.runtime.rpc import codec
from lazarus.runtime.rpc.channel import KEEPER, PID_HEADER, metadata_of, method, open_channel
from lazarus.runtime.rpc.credentials import Credentials
from lazarus.runtime.rpc.keeper_messages import (
    Abandon,
    FromTrainer,
    Reserve,
    Reserved,
    Seal,
    Target,
    ToTrainer,
)

_MAX_REPORTS = 1000


class _Stream:
    """One stream to the keeper, until it breaks."""

    def __init__(self, address: str, credentials: Credentials, on_done: Any) -> None:
        self.outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.replies: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.broken = False
        self._channel = open_channel(address, credentials)
        metadata = (*metadata_of(credentials), (PID_HEADER, str(os.getpid())))
        attach = self._channel.stream_stream(method(KEEPER, "Attach"))
        self._call = attach(iter(self.outbox.get, None), metadata=metadata)
        self._on_done = on_done
        spawn("keeper-link", self._read, on_death=say_so)

    def _read(self) -> None:
        try:
            for data in self._call:
                message: ToTrainer = codec.decode(ToTrainer, data)  # type: ignore[arg-type]
                if isinstance(message, Reserved):
                    self.replies.put(message)
                else:
                    self._on_done(json.loads(message.record))
        except grpc.RpcError as error:
            self.replies.put(error)
        except ValueError as error:  # the peer has another version, or is no keeper
            say_so("keeper-link", error)
        finally:
            self.broken = True
            self.replies.put(None)

    def close(self) -> None:
        self.outbox.put(None)
        self._call.cancel()
        self._channel.close()


class RemoteKeeperLink:
    """The ``KeeperLink`` that talks to a keeper's process.

    Only the snapshot thread may use a link; ``reports`` and ``next_report`` are for any thread. If
    the stream is broken, the next ``reserve`` opens a new one, to the same keeper or to the one
    that replaced it at the same address.
    """

    def __init__(
        self,
        address: str,
        *,
        credentials: Credentials,
        timeout_s: float,
        on_report: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        """Create a link; the first ``reserve`` connects.

        Args:
            address: The keeper's "host:port".
            credentials: The job's credentials.
            timeout_s: Longest wait for the answer to a reservation.
            on_report: Called with each report, on any thread; None: keep them for ``reports``.
        """
        self._address, self._credentials, self._timeout_s = address, credentials, timeout_s
        self._segments = MappedSegments()
        self._stream: _Stream | None = None
        self._on_report = on_report
        self._reported = threading.Condition()
        self._reports: list[dict[str, Any]] = []

    def reserve(
        self,
        ticket: int,
        *,
        tag: Tag,
        keys: Sequence[RecordKey],
        sizes: Sequence[int],
        published: int,
    ) -> list[memoryview]:
        """Reserve host memory for the images of a snapshot.

        Args:
            ticket: Number of the snapshot, not in use by another one.
            tag: Job, term and generation of the snapshot.
            keys: One key per image.
            sizes: Bytes of each image.
            published: Newest step whose commit is journaled.

        Returns:
            Writable memory of each image, to be filled before ``seal``.

        Raises:
            KeeperUnavailableError: The keeper did not answer in time.
            RefusedError: The keeper has no room, or this (term, generation) is over.
        """
        if self._stream is None or self._stream.broken:
            self._close_stream()
            self._segments.clear()
            self._stream = _Stream(self._address, self._credentials, self.add_report)
        request = Reserve(
            ticket=ticket,
            stamp=tag,
            keys=tuple(keys),
            num_bytes=tuple(sizes),
            published_step=published,
        )
        self._stream.outbox.put(codec.encode(request))
        reply = self._answer(self._stream, ticket)
        if reply.error:
            raise RefusedError(f"keeper {self._address}: {reply.error}")
        table = {s.id: (s.fd, s.num_bytes) for s in reply.segments}
        self._segments.add(pid=reply.pid, segments=table)
        return [
            self._segments.view(place.segment, place.offset, size)
            for place, size in zip(reply.places, sizes, strict=True)
        ]

    def _answer(self, stream: _Stream, ticket: int) -> Reserved:
        while True:
            try:
                reply = stream.replies.get(timeout=self._timeout_s)
            except queue.Empty:
                self._close_stream()
                raise KeeperUnavailableError(
                    f"keeper {self._address} gave no answer in {self._timeout_s} s"
                ) from None
            if reply is None or isinstance(reply, grpc.RpcError):
                self._close_stream()
                raise KeeperUnavailableError(f"keeper {self._address} is gone: {_text(reply)}")
            if isinstance(reply, Reserved) and reply.ticket == ticket:
                return reply

    def seal(
        self, ticket: int, *, copies: Mapping[int, Sequence[str]], persist: Sequence[int], url: str
    ) -> None:
        """Tell the keeper that the images of a ticket are complete.

        Args:
            ticket: The ticket given to ``reserve``.
            copies: Index of an image -> addresses of keepers that get a copy.
            persist: Indices of the images to write to storage.
            url: Where to write these.

        Raises:
            KeeperUnavailableError: The stream is broken.
        """
        seal = Seal(
            ticket=ticket,
            copies=tuple(Target(index=i, addresses=tuple(a)) for i, a in copies.items()),
            persist=tuple(persist),
            url=url,
        )
        self._send(seal)

    def abandon(self, ticket: int) -> None:
        """Tell the keeper that the images of a ticket will not be completed.

        Raises:
            KeeperUnavailableError: The stream is broken.
        """
        self._send(Abandon(ticket=ticket))

    def _send(self, message: FromTrainer) -> None:
        if self._stream is None or self._stream.broken:
            raise KeeperUnavailableError(f"keeper {self._address} is gone")
        self._stream.outbox.put(codec.encode(message))

    def add_report(self, record: dict[str, Any]) -> None:
        """Pass a report to ``on_report``, or keep it for ``reports``."""
        if self._on_report is not None:
            self._on_report(record)
            return
        with self._reported:
            self._reports = [*self._reports, record][-_MAX_REPORTS:]
            self._reported.notify_all()

    def reports(self) -> list[dict[str, Any]]:
        """All reports that came since the last call."""
        with self._reported:
            found, self._reports = self._reports, []
        return found

    def next_report(self, timeout_s: float) -> dict[str, Any] | None:
        """Wait for the oldest report not taken yet; None: no report came in time."""
        with self._reported:
            self._reported.wait_for(lambda: bool(self._reports), timeout_s)
            return self._reports.pop(0) if self._reports else None

    def _close_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def close(self) -> None:
        """Close the connection; does not end the keeper."""
        self._close_stream()
        self._segments.clear()


def _text(reply: Any) -> str:
    return "stream closed" if reply is None else f"{reply.code().name}: {reply.details()}"
