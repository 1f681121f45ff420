"""Messages between keepers, the ranks of their nodes and other nodes, about snapshots.

Every call carries the job's secret in its metadata. Messages that read or change a keeper's state
carry a ``stamp``: the sender's job, term and generation. An expert's image is sent as a stream: a
``RecordHead``, then the bytes in chunks without any framing of their own.
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
    """Base class of the messages and their parts."""


# ---- trainer -> keeper, one stream per trainer -------------------------------------------------


class Reserve(Message, frozen=True, kw_only=True, tag=True):
    """Ask for host memory for the images of one snapshot; answered by ``Reserved``."""

    ticket: Int
    stamp: Tag
    keys: tuple[RecordKey, ...]
    num_bytes: tuple[Size, ...]
    published_step: Int = 0  # newest step whose commit is journaled


class Target(Message, frozen=True, kw_only=True):
    """Addresses of the keepers that get a copy of image ``index`` of the ticket."""

    index: Size
    addresses: tuple[str, ...]


class Seal(Message, frozen=True, kw_only=True, tag=True):
    """The images of a ticket are complete and will not change.

    The keeper sends ``copies`` to other keepers and writes the images at the indices ``persist``
    to storage at ``url``.
    """

    ticket: Int
    copies: tuple[Target, ...] = ()
    persist: tuple[Size, ...] = ()
    url: str = ""


class Abandon(Message, frozen=True, kw_only=True, tag=True):
    """The images of a ticket will not be completed; the keeper frees their memory."""

    ticket: Int


FromTrainer = Reserve | Seal | Abandon


# ---- keeper -> trainer -------------------------------------------------------------------------


class Place(Message, frozen=True, kw_only=True):
    """Where an image is in shared memory: a segment's id, and an offset in bytes."""

    segment: Int
    offset: Size


class Segment(Message, frozen=True, kw_only=True):
    """A segment of shared memory, which a rank opens as /proc/{pid}/fd/{fd} of the keeper."""

    id: Int
    fd: Int
    num_bytes: Size


class Reserved(Message, frozen=True, kw_only=True, tag=True):
    """The answer to ``Reserve``: a place per image, or an ``error`` that says why there is none."""

    ticket: Int
    pid: Int
    places: tuple[Place, ...] = ()
    segments: tuple[Segment, ...] = ()
    error: str = ""


class Done(Message, frozen=True, kw_only=True, tag=True):
    """A snapshot, copy or persist of a ticket ended; ``record`` is the report as JSON."""

    ticket: Int
    record: str


ToTrainer = Reserved | Done


# ---- calls from anywhere in the job ------------------------------------------------------------


class RecordHead(Message, frozen=True, kw_only=True):
    """Describes the image in the chunks after it; ``checksum`` is its xxh3-128 in hex."""

    stamp: Tag
    key: RecordKey
    num_bytes: Size
    checksum: str
    published_step: Int = 0


class PushReply(Message, frozen=True, kw_only=True):
    """Whether the keeper took the pushed image; ``reason`` says why not."""

    accepted: bool
    reason: str = ""


class FetchRequest(Message, frozen=True, kw_only=True):
    """Ask for one expert's image; answered by a stream that begins with ``RecordHead``."""

    stamp: Tag
    layer: Int
    expert: Int
    generation: Int
    step: Int


class InventoryRequest(Message, frozen=True, kw_only=True):
    """Ask for a list of the images held; answered by ``InventoryReply``."""

    stamp: Tag


class Held(Message, frozen=True, kw_only=True):
    """One image that a keeper holds; ``checksum`` is its xxh3-128 in hex."""

    key: RecordKey
    num_bytes: Size
    checksum: str


class InventoryReply(Message, frozen=True, kw_only=True):
    """The images that a keeper holds, and the host memory it has taken, free slots included."""

    held: tuple[Held, ...]
    reserved_bytes: Size
    peak_bytes: Size
    stale_messages: Size
    pid: Int


class Drop(Message, frozen=True, kw_only=True):
    """One surplus copy of an expert, to be forgotten."""

    layer: Int
    expert: Int
    generation: Int
    step: Int


class Order(Message, frozen=True, kw_only=True):
    """Orders to a keeper; see ``KeeperClient.tell``.

    Attributes:
        stamp: The sender's job, term and generation.
        lineage: (generation, step) of every RESUME; the keeper forgets images that these made void.
        resume_step: Step of the newest RESUME; -1: ignore ``lineage``.
        drops: Surplus copies to forget.
        leave: Exit now.
    """

    stamp: Tag
    lineage: tuple[tuple[Int, Int], ...] = ()
    resume_step: Int = -1
    drops: tuple[Drop, ...] = ()
    leave: bool = False


class OrderReply(Message, frozen=True, kw_only=True):
    """How many images an ``Order`` made the keeper forget."""

    dropped: Size


# ---- records on the wire -----------------------------------------------------------------------


def chunks_of(head: RecordHead, data: memoryview) -> Iterator[bytes]:
    """Yield the stream of an image: its head, then its bytes in chunks of ``CHUNK_BYTES``."""
    yield codec.encode(head)
    for start in range(0, len(data), CHUNK_BYTES):
        yield bytes(data[start : start + CHUNK_BYTES])


def received_into(target: memoryview, chunks: Iterable[Any]) -> int:
    """Write the chunks of a stream into ``target``. Returns the number of bytes received.

    Raises:
        ValueError: The stream has more bytes than ``target``.
    """
    count = 0
    for chunk in chunks:
        if count + len(chunk) > len(target):
            raise ValueError(f"more than the announced {len(target)} bytes")
        target[count : count + len(chunk)] = chunk
        count += len(chunk)
    return count
