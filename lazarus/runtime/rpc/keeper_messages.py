"""What keepers, trainers and other nodes say to each other: snapshots in host memory.

Every call carries the job's secret as bearer metadata, every message that moves state its stamp: a
``Tag``, which says who speaks. A record on the wire is its head, then its bytes in bare chunks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Any

from msgspec import Meta, Struct

from lazarus.checkpoint.files.store import RecordKey, Tag
from lazarus.runtime.rpc import codec

CHUNK_BYTES = 1 << 20
Int = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
Size = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]


class Message(Struct, frozen=True, kw_only=True):
    """What travels as a call or an answer of its own."""


# ---- trainer -> keeper, one stream per trainer -------------------------------------------------


class Reserve(Message, frozen=True, kw_only=True, tag=True):
    """Host memory for these records, please."""

    ticket: Int
    stamp: Tag
    keys: tuple[RecordKey, ...]
    num_bytes: tuple[Size, ...]
    published_step: Int = 0  # commits up to here are journaled


class Target(Message, frozen=True, kw_only=True):
    """Keepers that shall hold a copy of record ``index`` of the ticket."""

    index: Size
    addresses: tuple[str, ...]


class Seal(Message, frozen=True, kw_only=True, tag=True):
    """The records are complete and will not change; those of ``persist`` go to storage."""

    ticket: Int
    copies: tuple[Target, ...] = ()
    persist: tuple[Size, ...] = ()
    url: str = ""


class Abandon(Message, frozen=True, kw_only=True, tag=True):
    """The records will not be completed."""

    ticket: Int


FromTrainer = Reserve | Seal | Abandon


# ---- keeper -> trainer -------------------------------------------------------------------------


class Place(Message, frozen=True, kw_only=True):
    """Where a record goes."""

    segment: Int
    offset: Size


class Segment(Message, frozen=True, kw_only=True):
    """Shared memory: /proc/{pid}/fd/{fd}."""

    id: Int
    fd: Int
    num_bytes: Size


class Reserved(Message, frozen=True, kw_only=True, tag=True):
    """The answer to Reserve; ``error`` says why there is no memory, empty: there is."""

    ticket: Int
    pid: Int
    places: tuple[Place, ...] = ()
    segments: tuple[Segment, ...] = ()
    error: str = ""


class Done(Message, frozen=True, kw_only=True, tag=True):
    """A snapshot, copy or persist of a ticket ended; ``record`` is JSON."""

    ticket: Int
    record: str


ToTrainer = Reserved | Done


# ---- calls from anywhere in the job ------------------------------------------------------------


class RecordHead(Message, frozen=True, kw_only=True):
    """What the chunks after it are; ``checksum`` is xxh3-128 of the image in hex."""

    stamp: Tag
    key: RecordKey
    num_bytes: Size
    checksum: str
    published_step: Int = 0


class PushReply(Message, frozen=True, kw_only=True):
    accepted: bool
    reason: str = ""


class FetchRequest(Message, frozen=True, kw_only=True):
    stamp: Tag
    layer: Int
    expert: Int
    generation: Int
    step: Int


class InventoryRequest(Message, frozen=True, kw_only=True):
    stamp: Tag


class Held(Message, frozen=True, kw_only=True):
    key: RecordKey
    num_bytes: Size
    checksum: str


class InventoryReply(Message, frozen=True, kw_only=True):
    """What a keeper holds, and the host memory taken, free slots included."""

    held: tuple[Held, ...]
    reserved_bytes: Size
    peak_bytes: Size
    stale_messages: Size
    pid: Int


class Drop(Message, frozen=True, kw_only=True):
    """One surplus copy."""

    layer: Int
    expert: Int
    generation: Int
    step: Int


class Order(Message, frozen=True, kw_only=True):
    """Orders of the newest generation.

    ``lineage`` holds (generation, step) of every RESUME; with ``resume_step`` the keeper forgets
    what it voids. ``leave``: exit now.
    """

    stamp: Tag
    lineage: tuple[tuple[Int, Int], ...] = ()
    resume_step: Int = -1
    drops: tuple[Drop, ...] = ()
    leave: bool = False


class OrderReply(Message, frozen=True, kw_only=True):
    dropped: Size


# ---- records on the wire -----------------------------------------------------------------------


def chunks_of(head: RecordHead, data: memoryview) -> Iterator[bytes]:
    """A record as a stream: its head, then its bytes."""
    yield codec.encode(head)
    for start in range(0, len(data), CHUNK_BYTES):
        yield bytes(data[start : start + CHUNK_BYTES])


def received_into(target: memoryview, chunks: Iterable[Any]) -> int:
    """Put the chunks of a stream into memory; returns the bytes received.

    Raises:
        ValueError: More bytes than were announced.
    """
    count = 0
    for chunk in chunks:
        if count + len(chunk) > len(target):
            raise ValueError(f"more than the announced {len(target)} bytes")
        target[count : count + len(chunk)] = chunk
        count += len(chunk)
    return count
