"""What the ranks of one machine say to each other: numbered messages, and blocks they speak of.

One ``Wire`` a rank. It knows its peers' links and hands out blocks to send from; which messages
make a collective is told in ``shared``.
"""

from __future__ import annotations

import secrets
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from dispatcher.errors import LinkError, PartedLinkError
from dispatcher.exchange import Exchange
from dispatcher.local.blocks import Block, BlockPool
from dispatcher.local.links import LABEL_BYTES, Door, Link, Message, machine

_NAME_BYTES = 64
ANSWER = 1  # a phase is even; the one after it says "I have read it"


@dataclass(frozen=True, slots=True)
class Place:
    """Content that peers can read: where it begins in a block, and whether it is only lent.

    What is lent may be written to as soon as all readers have answered, so they must answer.
    """

    block: Block
    begin: int
    is_lent: bool


class Wire:
    """Links to all peers, the blocks to send from, and the count of collectives."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.pool = BlockPool()
        self._links: dict[int, Link] = {}
        self._door: Door | None = None
        self._aborted = False
        # For whom this rank gave up, why, and what it raised for that.
        self._failed: tuple[int, str, type[LinkError]] | None = None
        self._number = 0
        self._open: set[int] = set()

    def connect(self, over: Exchange, *, timeout_s: float) -> bool:
        """Link all ranks; False, on every rank, where they are not on one machine.

        Raises:
            LinkError: A peer did not come, or ``abort`` was called.
        """
        try:
            self._door = Door()
            place = machine().encode()
            own = self._door.name + zlib.crc32(place).to_bytes(4, "little") + place[:36]
        except OSError:  # sockets or memory files are forbidden here: like no other machine
            own = secrets.token_bytes(_NAME_BYTES)
        own_N = torch.frombuffer(bytearray(own.ljust(_NAME_BYTES, b"\0")), dtype=torch.uint8)
        all_N = torch.empty(self.size * _NAME_BYTES, dtype=torch.uint8)
        over.all_gather(all_N, own_N, label="digest")
        rows = [bytes(row.tolist()) for row in all_N.view(self.size, _NAME_BYTES)]
        if len({row[16:] for row in rows}) > 1:
            if self._door is not None:
                self._door.close()
            return False
        if self._aborted or self._door is None:
            raise LinkError(peer=-1, reason="aborted")
        names = [row[:16] for row in rows]
        self._door.links(names, rank=self.rank, timeout_s=timeout_s, kept=self._keep)
        return True

    def _keep(self, link: Link) -> None:
        self._links[link.peer] = link
        if self._aborted:
            link.shut()

    def abort(self) -> None:
        """Free whoever waits, here and on the peers, now and from now on. For any thread."""
        self._aborted = True
        if self._door is not None:
            self._door.shut()
        for link in list(self._links.values()):
            link.shut()

    def close(self) -> None:
        """Abort and give sockets and memory back."""
        self.abort()
        for link in self._links.values():
            link.close()
            link.blocks.clear()
        self.pool.close()

    def begin(self) -> int:
        """The number of a new collective.

        Raises:
            LinkError: After ``abort``, or after a collective that failed.
        """
        if self._aborted:
            raise LinkError(peer=-1, reason="aborted")
        if self._failed is not None:
            peer, reason, kind = self._failed
            raise kind(peer=peer, reason=reason)
        self._number += 1
        self._open.add(self._number)
        return self._number

    def end(self, number: int) -> None:
        """This rank has read all that it is to read of the collective."""
        self._open.remove(number)

    @property
    def peers(self) -> list[Link]:
        """Links from the next rank on, so that not all begin with the same one."""
        order = (*range(self.rank + 1, self.size), *range(self.rank))
        return [self._links[peer] for peer in order]

    def block(self, size: int, number: int) -> Block:
        """A block to send from; it is used again when every peer has ended this collective."""
        ended = min(link.ended for link in self._links.values())
        block = self.pool.take(size, ended_everywhere=ended)
        block.busy_until = number
        return block

    def say(
        self,
        link: Link,
        number: int,
        label: str,
        *,
        phase: int = 0,
        size: int = 0,
        whole: int | None = None,
        place: Place | None = None,
        content: bytes = b"",
    ) -> None:
        """One message: ``size`` bytes of ``whole``, which are at ``place``, or in ``content``."""
        message = Message(
            number, min(self._open) - 1, _padded(label), phase,
            place.block.number if place else -1, place.begin if place else 0, size,
            size if whole is None else whole, place.block.size if place else 0,
            bool(place and place.is_lent), content,
        )  # fmt: skip
        try:
            link.send(message, place.block if place else None)
        except LinkError as problem:
            self._give_up(problem)
            raise

    def hear(self, link: Link, number: int, label: str, *, whole: int, phase: int = 0) -> Message:
        """The peer's message, which must belong to ``whole`` bytes.

        Raises:
            LinkError: The peer is gone.
            PartedLinkError: It is at something else.
        """
        try:
            message = link.receive(number, phase)
            if message.label != _padded(label):
                theirs = message.label.rstrip(b"\0").decode(errors="replace")
                reason = f"rank {self.rank} is at {label}; rank {link.peer} is at {theirs}"
                raise PartedLinkError(peer=link.peer, reason=reason)
        except LinkError as problem:
            self._give_up(problem)
            raise
        self.check_sizes(link.peer, label, message.whole, whole)
        return message

    def check_sizes(self, peer: int, label: str, sent: int, wanted: int) -> None:
        """Raises LinkError when a rank sends another number of bytes than is expected."""
        if sent != wanted:
            reason = f"it sends {sent} bytes for {label!r}, {wanted} were expected"
            problem = LinkError(peer=peer, reason=reason)
            self._give_up(problem)
            raise problem

    def _give_up(self, problem: LinkError) -> None:
        """Tell all peers whom this rank gave up for, so that none of them waits for this one."""
        if self._failed is None and not self._aborted:
            # Not the error itself: its traceback would keep this wire's memory alive.
            self._failed = problem.peer, problem.reason, type(problem)
            for link in self._links.values():
                link.part(problem)

    def content(self, link: Link, message: Message) -> Tensor:
        """What a message speaks of, uint8."""
        if message.block < 0:
            text = bytearray(message.content or b"\0")
            return torch.frombuffer(text, dtype=torch.uint8)[: message.size]
        begin = message.begin
        return link.blocks[message.block].bytes_N[begin : begin + message.size]

    def take(self, link: Link, number: int, label: str, into_N: Tensor, *, phase: int = 0) -> int:
        """Copy the peer's next piece to the begin of ``into_N``; returns its bytes.

        ``into_N`` holds what is still to come; the peer must mean as much.
        """
        message = self.hear(link, number, label, whole=into_N.shape[0], phase=phase)
        if message.size:
            into_N[: message.size].copy_(self.content(link, message))
        if message.is_lent:
            self.say(link, number, label, phase=phase + ANSWER)
        return message.size

    def answered(self, links: list[Link], number: int, label: str, *, phase: int = 0) -> None:
        """Wait until these peers have read what was lent to them."""
        for link in links:
            self.hear(link, number, label, whole=0, phase=phase + ANSWER)


def _padded(label: str) -> bytes:
    return label.encode()[:LABEL_BYTES].ljust(LABEL_BYTES, b"\0")
