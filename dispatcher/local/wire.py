"""``Wire``: numbered messages between the ranks of one node, and the blocks they refer to.

Each rank has one ``Wire`` with a link to every peer and a pool of blocks to send from.
``shared.py`` builds the collectives from these messages.
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
ANSWER = 1  # added to an even phase: acknowledgement that its content was read


@dataclass(frozen=True, slots=True)
class Place:
    """Position of content in a block that peers can read.

    If ``is_lent``, the owner rewrites the content once all readers have acknowledged it, so every
    reader must send an acknowledgement.
    """

    block: Block
    begin: int
    is_lent: bool


class Wire:
    """Links to all peers, the blocks to send from, and the counter of collectives."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.pool = BlockPool()
        self._links: dict[int, Link] = {}
        self._door: Door | None = None
        self._aborted = False
        # The rank because of which this rank gave up, the reason, and the error class it raised.
        self._failed: tuple[int, str, type[LinkError]] | None = None
        self._number = 0
        self._open: set[int] = set()

    def connect(self, over: Exchange, *, timeout_s: float) -> bool:
        """Link all ranks. Returns False, on every rank, if they are not all on one node.

        Args:
            over: An exchange that already connects the ranks.
            timeout_s: Longest wait for a peer, here and for every later message, in seconds.

        Raises:
            LinkError: A peer did not connect, or ``abort`` was called.
        """
        try:
            self._door = Door()
            place = machine().encode()
            own = self._door.name + zlib.crc32(place).to_bytes(4, "little") + place[:36]
        except OSError:  # no sockets or memory files: use a name that equals no other
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
        """Make every present and future wait fail, here and on the peers. Thread-safe."""
        self._aborted = True
        if self._door is not None:
            self._door.shut()
        for link in list(self._links.values()):
            link.shut()

    def close(self) -> None:
        """Abort, and release sockets and memory."""
        self.abort()
        for link in self._links.values():
            link.close()
            link.blocks.clear()
        self.pool.close()

    def begin(self) -> int:
        """Start a collective and return its number.

        Raises:
            LinkError: ``abort`` was called, or an earlier collective failed.
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
        """Mark a collective as ended: this rank has read everything it needs."""
        self._open.remove(number)

    @property
    def peers(self) -> list[Link]:
        """Links to all peers, starting with the next rank, so that ranks start differently."""
        order = (*range(self.rank + 1, self.size), *range(self.rank))
        return [self._links[peer] for peer in order]

    def block(self, size: int, number: int) -> Block:
        """Return a block to send from, reusable once every peer has ended collective ``number``."""
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
        """Send one message: ``size`` bytes of ``whole``, either at ``place`` or in ``content``."""
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
        """Wait for the peer's message of this collective and phase.

        Args:
            link: Link to the peer.
            number: Number of the collective.
            label: Label that the message must have.
            whole: Number of bytes that the peer must still have for this rank.
            phase: Phase of the message.

        Raises:
            LinkError: The peer is gone, or has another number of bytes.
            PartedLinkError: The peer is in a collective with another label.
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
        """Raise LinkError if a rank sends another number of bytes than expected."""
        if sent != wanted:
            reason = f"it sends {sent} bytes for {label!r}, {wanted} were expected"
            problem = LinkError(peer=peer, reason=reason)
            self._give_up(problem)
            raise problem

    def _give_up(self, problem: LinkError) -> None:
        """Tell all peers because of whom this rank gives up, so that none of them waits for it."""
        if self._failed is None and not self._aborted:
            # Do not keep the error itself: its traceback would keep this wire's memory alive.
            self._failed = problem.peer, problem.reason, type(problem)
            for link in self._links.values():
                link.part(problem)

    def content(self, link: Link, message: Message) -> Tensor:
        """Return the content of a message, uint8."""
        if message.block < 0:
            text = bytearray(message.content or b"\0")
            return torch.frombuffer(text, dtype=torch.uint8)[: message.size]
        begin = message.begin
        return link.blocks[message.block].bytes_N[begin : begin + message.size]

    def take(self, link: Link, number: int, label: str, into_N: Tensor, *, phase: int = 0) -> int:
        """Copy the peer's next piece to the start of ``into_N``; returns its size in bytes.

        ``into_N`` has the size of everything that the peer still has to send.
        """
        message = self.hear(link, number, label, whole=into_N.shape[0], phase=phase)
        if message.size:
            into_N[: message.size].copy_(self.content(link, message))
        if message.is_lent:
            self.say(link, number, label, phase=phase + ANSWER)
        return message.size

    def answered(self, links: list[Link], number: int, label: str, *, phase: int = 0) -> None:
        """Wait until these peers have acknowledged the content that was lent to them."""
        for link in links:
            self.hear(link, number, label, whole=0, phase=phase + ANSWER)


def _padded(label: str) -> bytes:
    return label.encode()[:LABEL_BYTES].ljust(LABEL_BYTES, b"\0")
