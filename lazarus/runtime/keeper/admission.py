"""Which messages a keeper accepts: those of its job, of the newest term and generation or later.

This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Container
from typing import TypeVar

import grpc

from lazarus.checkpoint.files.store import Tag
from lazarus.runtime.rpc import codec
from lazarus.runtime.rpc.keeper_messages import RecordHead, Reserve

# Largest jump of term or generation that a message may make. A bogus huge value would become the
# newest, and every later message would be refused as stale.
_FURTHEST = 1 << 20
_Kind = TypeVar("_Kind")


class Admission:
    """The newest term and generation that a keeper knows, and the number of refused messages.

    Not thread-safe: call the methods with the service's lock held.

    Args:
        job: The keeper's job.

    Attributes:
        newest: The newest term and generation.
        num_stale_messages: Messages refused as stale, or dropped as invalid.
    """

    def __init__(self, job: str) -> None:
        self.newest = Tag(job=job, term=0, generation=0)
        self.num_stale_messages = 0

    def drop(self) -> None:
        """Count a message that was dropped as invalid."""
        self.num_stale_messages += 1

    def stale_reason(self, tag: Tag) -> str:
        """Why a message with this tag is refused, which is counted; empty: it is accepted.

        A newer (term, generation) becomes the keeper's own.
        """
        if reason := self._reason(tag):
            self.num_stale_messages += 1
        else:
            self.newest = tag
        return reason

    def _reason(self, tag: Tag) -> str:
        newest = self.newest
        if tag.job != newest.job:
            return f"job {tag.job!r} is not {newest.job!r}"
        if tag.term < newest.term or tag.generation < newest.generation:
            return (
                f"(term {tag.term}, generation {tag.generation}) is over: this keeper is at "
                f"({newest.term}, {newest.generation})"
            )
        if max(tag.term - newest.term, tag.generation - newest.generation) > _FURTHEST:
            return f"(term {tag.term}, generation {tag.generation}) cannot have come so soon"
        return ""

    def refuse_stale(self, tag: Tag, context: grpc.ServicerContext) -> None:
        """Abort the call if a message with this tag is refused."""
        if reason := self.stale_reason(tag):
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, reason)


def decoded(kind: type[_Kind], data: bytes, context: grpc.ServicerContext) -> _Kind:
    """Decode the message of a call; abort the call if that fails."""
    try:
        return codec.decode(kind, data)
    except ValueError as problem:
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(problem))
        raise


def odd_reservation(request: Reserve, *, open_tickets: Container[int]) -> str:
    """What is wrong with a reservation; empty: nothing."""
    if len(request.keys) != len(request.num_bytes):
        return f"{len(request.keys)} records of {len(request.num_bytes)} sizes"
    if request.ticket in open_tickets:
        return f"ticket {request.ticket} is in use"
    return ""


def odd_head(head: RecordHead) -> str:
    """What is wrong with the head of an image that another keeper sends; empty: nothing."""
    return "" if head.num_bytes > 0 else "an empty record"
