"""Keeper messages to and from the records of the checkpoint room."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from lazarus.checkpoint.store import RecordKey, Tag
from lazarus.runtime.rpc import keeper_pb2 as pb

CHUNK_BYTES = 1 << 20


def to_stamp(tag: Tag) -> Any:
    """The stamp of a (job, term, generation)."""
    return pb.Stamp(job=tag.job, term=tag.term, generation=tag.generation)


def from_stamp(stamp: Any) -> Tag:
    """The inverse of ``to_stamp``."""
    return Tag(job=stamp.job, term=stamp.term, generation=stamp.generation)


def to_key(key: RecordKey) -> Any:
    """A record's key as a message."""
    return pb.Key(
        layer=key.layer,
        expert=key.expert,
        step=key.step,
        generation=key.generation,
        routed=key.routed,
        parts=list(key.parts),
    )


def from_key(key: Any) -> RecordKey:
    """The inverse of ``to_key``."""
    return RecordKey(
        layer=key.layer,
        expert=key.expert,
        step=key.step,
        generation=key.generation,
        routed=key.routed,
        parts=tuple(key.parts),
    )


def chunks_of(head: Any, data: memoryview) -> Iterator[Any]:
    """A record as a stream: its head, then its bytes."""
    yield pb.Chunk(head=head)
    for start in range(0, len(data), CHUNK_BYTES):
        yield pb.Chunk(data=bytes(data[start : start + CHUNK_BYTES]))


def received_into(target: memoryview, chunks: Iterable[Any]) -> int:
    """Put the data of a stream into memory; returns the bytes received.

    Raises:
        ValueError: More bytes than were announced, or a second head.
    """
    count = 0
    for chunk in chunks:
        if chunk.WhichOneof("body") != "data":
            raise ValueError("a second head in one stream")
        if count + len(chunk.data) > len(target):
            raise ValueError(f"more than the announced {len(target)} bytes")
        target[count : count + len(chunk.data)] = chunk.data
        count += len(chunk.data)
    return count
