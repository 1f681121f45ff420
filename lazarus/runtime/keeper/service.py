"""The keeper's gRPC service: reservations, seals, copies, fetches, inventories and orders.

This module imports no torch.
"""

from __future__ import annotations

import json
import os
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import xxhash

from lazarus.basics.threads import OnDeath, say_so, spawn
from lazarus.checkpoint.errors import DamagedError, RefusedError
from lazarus.checkpoint.files.storage import Probe, no_probe
from lazarus.checkpoint.files.store import Tag
from lazarus.checkpoint.format.image import parse_image
from lazarus.checkpoint.in_memory.arena import Arena
from lazarus.checkpoint.in_memory.memory import KeeperMemory, Ticket, Version
from lazarus.runtime.host.memory import machine_bytes
from lazarus.runtime.keeper.admission import Admission, decoded, odd_head, odd_reservation
from lazarus.runtime.keeper.client import check_identity
from lazarus.runtime.keeper.jobs import Copying, KeeperWork, Persisting
from lazarus.runtime.keeper.process import KeeperConfig
from lazarus.runtime.rpc import codec
from lazarus.runtime.rpc.channel import KEEPER, PID_HEADER, add_service, bind, make_server
from lazarus.runtime.rpc.keeper_messages import (
    Abandon,
    Done,
    FetchRequest,
    FromTrainer,
    Held,
    InventoryReply,
    InventoryRequest,
    Order,
    OrderReply,
    Place,
    PushReply,
    RecordHead,
    Reserve,
    Reserved,
    Seal,
    Segment,
    chunks_of,
    received_into,
)

_MAX_STREAMS = 256  # for the node's ranks, and for other nodes that fetch and copy


@dataclass(eq=False)
class _Trainer:
    """One attached rank: its process id, open tickets and outgoing messages."""

    pid: int
    outbox: queue.SimpleQueue[bytes | None] = field(default_factory=queue.SimpleQueue)
    tickets: dict[int, tuple[Tag, Ticket]] = field(default_factory=dict)
    published_step: int = -1


class KeeperService:
    """Answers the calls to a keeper.

    One lock guards the bookkeeping of the memory. Bytes are read and written without the lock, in
    versions that are pinned or not visible yet.

    Args:
        config: The keeper's settings.
        stop: Set when an order says that the keeper must exit.
        probe: Called at labelled points of a persist, for crash tests.
        on_death: Called if a thread of the service dies.
    """

    def __init__(
        self,
        config: KeeperConfig,
        *,
        stop: threading.Event,
        probe: Probe = no_probe,
        on_death: OnDeath = say_so,
    ) -> None:
        self._stop = stop
        self._on_death = on_death
        self._lock = threading.Lock()
        self._arena = Arena(limit_bytes=min(config.limit_bytes, machine_bytes()))
        self._memory = KeeperMemory(self._arena)
        self._admission = Admission(config.job)
        self._orphans: list[tuple[int, Ticket]] = []
        self._work = KeeperWork(credentials=config.credentials, probe=probe, unpin=self._unpin)

    # ---- trainers ------------------------------------------------------------------------------

    def attach(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """Serve the stream of one of the node's ranks until it ends."""
        pid = str(dict(context.invocation_metadata()).get(PID_HEADER, "0"))
        trainer = _Trainer(pid=int(pid) if pid.isdecimal() and len(pid) < 10 else 0)
        self._free_orphans(attached=trainer.pid)
        if not context.add_callback(lambda: trainer.outbox.put(None)):
            return
        spawn("trainer", self._read, requests, trainer, on_death=self._on_death)
        while (message := trainer.outbox.get()) is not None:
            yield message

    def _read(self, requests: Iterator[bytes], trainer: _Trainer) -> None:
        try:
            for data in requests:
                self._obey(trainer, data)
        except grpc.RpcError:
            pass  # the stream broke: handled below
        finally:
            with self._lock:
                # A rank that only lost its stream may still write into its slots, so they are
                # freed once its process is gone or attaches again.
                self._orphans += [(trainer.pid, t) for _, t in trainer.tickets.values()]
                trainer.tickets.clear()
            self._free_orphans(attached=0)
            trainer.outbox.put(None)

    def _obey(self, trainer: _Trainer, data: bytes) -> None:
        """Handle one message of a rank; an invalid message is dropped and counted."""
        try:
            message: FromTrainer = codec.decode(FromTrainer, data)  # type: ignore[arg-type]
        except ValueError:
            with self._lock:
                self._admission.drop()
            return
        match message:
            case Reserve():
                trainer.outbox.put(codec.encode(self._reserve(trainer, message)))
            case Seal():
                self._seal(trainer, message)
            case Abandon(ticket=ticket):
                self._abandon(trainer, ticket)

    def _free_orphans(self, *, attached: int) -> None:
        with self._lock:
            waiting = []
            for pid, ticket in self._orphans:
                if pid == attached or not os.path.exists(f"/proc/{pid}"):
                    self._memory.abandon(ticket)
                else:
                    waiting.append((pid, ticket))
            self._orphans = waiting

    def _reserve(self, trainer: _Trainer, request: Reserve) -> Reserved:
        self._free_orphans(attached=0)
        number, pid, tag = request.ticket, os.getpid(), request.stamp
        with self._lock:
            if error := self._admission.stale_reason(tag) or odd_reservation(
                request, open_tickets=trainer.tickets
            ):
                return Reserved(ticket=number, pid=pid, error=error)
            trainer.published_step = request.published_step
            self._memory.published(request.published_step, generation=tag.generation)
            try:
                ticket = self._memory.reserve(request.keys, request.num_bytes)
            except MemoryError as problem:
                return Reserved(ticket=number, pid=pid, error=str(problem))
            trainer.tickets[number] = (tag, ticket)
            slots = [version.slot for version in ticket.versions]
            used = {slot.segment for slot in slots}
            segments = [one for one in self._arena.segments() if one[0] in used]
        return Reserved(
            ticket=number,
            pid=pid,
            places=tuple(Place(segment=s.segment, offset=s.offset) for s in slots),
            segments=tuple(Segment(id=i, fd=fd, num_bytes=size) for i, fd, size in segments),
        )

    def _abandon(self, trainer: _Trainer, number: int) -> None:
        with self._lock:
            if number in trainer.tickets:
                self._memory.abandon(trainer.tickets.pop(number)[1])

    def _seal(self, trainer: _Trainer, request: Seal) -> None:
        with self._lock:
            if request.ticket not in trainer.tickets:
                return
            count = len(trainer.tickets[request.ticket][1].versions)
            if any(i >= count for i in (*request.persist, *(t.index for t in request.copies))):
                self._admission.drop()
                return
            tag, ticket = trainer.tickets.pop(request.ticket)
        for version in ticket.versions:  # no other thread uses these versions yet
            version.checksum = xxhash.xxh3_128_hexdigest(self._memory.view(version))
        persisted = [ticket.versions[i] for i in request.persist]
        copied = [(ticket.versions[t.index], t.addresses) for t in request.copies]
        with self._lock:
            for version in persisted:
                self._memory.pin(version)
            for version, addresses in copied:
                version.pins += len(addresses)
            for version in ticket.versions:
                self._memory.complete(version)
        report = _Reporter(trainer, request.ticket)
        first = ticket.versions[0].key if ticket.versions else None
        report(
            {
                "kind": "snapshot",
                "ok": True,
                "step": first.step if first else -1,
                "generation": tag.generation,
                "records": len(ticket.versions),
                "bytes": sum(v.num_bytes for v in ticket.versions),
            }
        )
        views = {id(v): self._memory.view(v) for v in ticket.versions}
        if any(addresses for _, addresses in copied):
            copying = Copying(
                tag=tag,
                records=[(v, views[id(v)], a) for v, a in copied],
                published_step=trainer.published_step,
                report=report,
            )
            self._work.copy(copying)
        if persisted:
            records = [(v, views[id(v)]) for v in persisted]
            self._work.persist(Persisting(tag=tag, url=request.url, records=records, report=report))

    def _unpin(self, version: Version) -> None:
        with self._lock:
            self._memory.unpin(version)

    # ---- other nodes ---------------------------------------------------------------------------

    def push(self, chunks: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        """Receive an image from another keeper; it becomes visible once complete and verified."""
        head = decoded(RecordHead, next(chunks, b""), context)
        return codec.encode(self._take_in(head, chunks))

    def _take_in(self, head: RecordHead, chunks: Iterator[bytes]) -> PushReply:
        with self._lock:
            if error := self._admission.stale_reason(head.stamp):
                return PushReply(accepted=False, reason=error)
            self._memory.published(head.published_step, generation=head.stamp.generation)
            if error := odd_head(head):
                return PushReply(accepted=False, reason=error)
            try:
                ticket = self._memory.reserve([head.key], [head.num_bytes])
            except MemoryError as problem:
                return PushReply(accepted=False, reason=str(problem))
        (version,) = ticket.versions
        reason = self._receive(version, head, chunks)
        with self._lock:
            if not reason and head.stamp.generation < self._admission.newest.generation:
                reason = "fenced while receiving"
            if reason:
                self._memory.withdraw(ticket)
            else:
                self._memory.complete(version)
        return PushReply(accepted=not reason, reason=reason)

    def _receive(self, version: Version, head: RecordHead, chunks: Iterator[bytes]) -> str:
        """Fill a version's slot from a stream. Returns why that failed; empty: it did not."""
        view = self._memory.view(version)
        try:
            count = received_into(view, chunks)
            if count != head.num_bytes:  # return before reading the slot, which would page it in
                return f"{count} of {head.num_bytes} bytes came"
            version.checksum = xxhash.xxh3_128_hexdigest(view)
            if version.checksum != head.checksum:
                return "checksum differs"
            check_identity(version.key, parse_image(view).metadata)
        except (ValueError, DamagedError) as error:
            return str(error)
        except grpc.RpcError:
            return "sender gone"
        finally:
            view.release()
        return ""

    def fetch(self, data: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        """Send an image to a rank that restores it."""
        request = decoded(FetchRequest, data, context)
        with self._lock:
            self._admission.refuse_stale(request.stamp, context)
            try:
                version = self._memory.find(
                    layer=request.layer,
                    expert=request.expert,
                    generation=request.generation,
                    step=request.step,
                )
            except RefusedError as error:
                context.abort(grpc.StatusCode.NOT_FOUND, str(error))
            self._memory.pin(version)
        try:
            head = RecordHead(
                stamp=self._admission.newest,
                key=version.key,
                num_bytes=version.num_bytes,
                checksum=version.checksum,
            )
            yield from chunks_of(head, self._memory.view(version))
        finally:
            self._unpin(version)

    def inventory(self, data: bytes, context: grpc.ServicerContext) -> bytes:
        """List the images held, and the memory they take."""
        request = decoded(InventoryRequest, data, context)
        with self._lock:
            self._admission.refuse_stale(request.stamp, context)
            held = self._memory.held()
            reply = InventoryReply(
                held=tuple(
                    Held(key=v.key, num_bytes=v.num_bytes, checksum=v.checksum) for v in held
                ),
                reserved_bytes=self._arena.reserved_bytes,
                peak_bytes=self._arena.peak_bytes,
                stale_messages=self._admission.num_stale_messages,
                pid=os.getpid(),
            )
        return codec.encode(reply)

    def tell(self, data: bytes, context: grpc.ServicerContext) -> bytes:
        """Carry out an order: forget void images, drop surplus copies, or exit."""
        order = decoded(Order, data, context)
        with self._lock:
            self._admission.refuse_stale(order.stamp, context)
            dropped = 0
            if order.resume_step >= 0:
                dropped += self._memory.prune(order.lineage, resume_step=order.resume_step)
            tags = {(d.layer, d.expert, d.generation, d.step) for d in order.drops}
            dropped += self._memory.drop(tags)
        if order.leave:
            self._stop.set()
        return codec.encode(OrderReply(dropped=dropped))


class _Reporter:
    """Sends a report as JSON to the rank that made the ticket, if its stream is still open."""

    def __init__(self, trainer: _Trainer, ticket: int) -> None:
        self._trainer, self._ticket = trainer, ticket

    def __call__(self, record: dict[str, Any]) -> None:
        done = Done(ticket=self._ticket, record=json.dumps(record))
        self._trainer.outbox.put(codec.encode(done))


def serve(service: KeeperService, config: KeeperConfig) -> tuple[grpc.Server, int]:
    """Start a gRPC server for the service. Returns the server and its port.

    Raises:
        OSError: The address in ``config.bind`` is not available.
    """
    server = make_server(config.credentials, max_streams=_MAX_STREAMS)
    handlers = {
        "Attach": grpc.stream_stream_rpc_method_handler(service.attach),  # a rank of this node
        "Push": grpc.stream_unary_rpc_method_handler(service.push),
        "Fetch": grpc.unary_stream_rpc_method_handler(service.fetch),
        "Inventory": grpc.unary_unary_rpc_method_handler(service.inventory),
        "Tell": grpc.unary_unary_rpc_method_handler(service.tell),
    }
    add_service(server, KEEPER, handlers)
    port = bind(server, config.bind, config.credentials)
    server.start()
    return server, port
