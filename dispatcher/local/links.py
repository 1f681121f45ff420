"""Local sockets between the ranks of one machine: short messages in order, each with a block's
descriptor where the peer does not know the block yet. A peer that dies or leaves ends its link, so
that whoever waits for it is told at once.
"""

from __future__ import annotations

import os
import secrets
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from dispatcher.errors import LinkError, PartedLinkError
from dispatcher.local.blocks import Block, mapped

INLINE_BYTES = 4096  # content up to this size travels in the message itself
_PARTING = -1  # number of the last message of a rank that gives up; exchanges count from 1
LABEL_BYTES = 64  # of a label that travel with a message
_PARTED = 1  # phase of a last word that tells of ranks in different collectives
_HEAD = struct.Struct(f"<qq{LABEL_BYTES}sIqqqqq?")
_ANCILLARY = socket.CMSG_SPACE(4)


@dataclass(slots=True)
class Message:
    """One rank's word to another about one exchange.

    Attributes:
        number: Of the exchange; both count alike.
        ended: The last exchange that the sender has ended, together with all before it.
        label: What the exchange is for, padded with zeros.
        phase: Even: which part of the collective. Odd: "I have read the one before".
        block: The sender's block that holds the content; -1 where there is none.
        begin: First byte in the block.
        is_lent: The sender waits for the peer's word that it has read the content.
        size: Bytes of content.
        whole: Bytes that the sender still has for the peer, this content included.
        room: Bytes of the block.
        content: The content itself where it is short.
    """

    number: int
    ended: int
    label: bytes
    phase: int
    block: int
    begin: int
    size: int
    whole: int
    room: int
    is_lent: bool
    content: bytes = b""


@dataclass(eq=False)
class Link:
    """One peer's socket and what is known of its blocks."""

    peer: int
    socket: socket.socket
    told: set[int] = field(default_factory=set)  # our blocks that the peer has mapped
    blocks: dict[int, Block] = field(default_factory=dict)  # the peer's
    early: dict[tuple[int, int], Message] = field(default_factory=dict)
    ended: int = 0  # the last exchange that the peer has ended

    def send(self, message: Message, block: Block | None) -> None:
        """Raises LinkError when the peer is gone or does not read."""
        head = _HEAD.pack(
            message.number, message.ended, message.label, message.phase, message.block,
            message.begin, message.size, message.whole, message.room, message.is_lent,
        )  # fmt: skip
        try:
            if block is not None and block.number not in self.told:
                socket.send_fds(self.socket, [head], [block.fd])
                self.told.add(block.number)
            else:
                self.socket.send(head + message.content)
        except OSError as problem:
            known = self._blamed()
            raise known or LinkError(peer=self.peer, reason=_reason(problem)) from problem

    def part(self, problem: LinkError) -> None:
        """This rank's last word: whom it gave up for. Never waits; frees whoever waits here."""
        is_parted = isinstance(problem, PartedLinkError)
        if is_parted or problem.peer != self.peer:
            phase = _PARTED if is_parted else 0
            head = _HEAD.pack(_PARTING, 0, b"", phase, problem.peer, 0, 0, 0, 0, False)
            with suppress(OSError):
                text = problem.reason.encode()[:INLINE_BYTES]
                self.socket.send(head + text, socket.MSG_DONTWAIT)
        self.shut()

    def _blamed(self) -> LinkError | None:
        """What a peer that reads no more had to say, if it was not its own fault."""
        try:
            while True:
                self._next(socket.MSG_DONTWAIT)
        except LinkError as last:
            is_other = last.peer != self.peer or isinstance(last, PartedLinkError)
            return last if is_other else None

    def receive(self, number: int, phase: int) -> Message:
        """The peer's message about this exchange; earlier ones are kept for who asks for them.

        Raises:
            LinkError: The peer is gone, silent for the time limit, or ahead of this rank; or it
                gave up for another rank, which is the one that is named then.
        """
        found = self.early.pop((number, phase), None)
        while found is None:
            message = self._next()
            if (message.number, message.phase) == (number, phase):
                found = message
            else:
                self.early[message.number, message.phase] = message
        return found

    def _next(self, flags: int = 0) -> Message:
        try:
            data, ancillary, _, _ = self.socket.recvmsg(
                _HEAD.size + INLINE_BYTES, _ANCILLARY, flags
            )
        except OSError as problem:
            raise LinkError(peer=self.peer, reason=_reason(problem)) from problem
        if not data:
            raise LinkError(peer=self.peer, reason="it left or died")
        message = Message(*_HEAD.unpack_from(data))
        message.content = data[_HEAD.size :]
        if message.number == _PARTING:
            kind = PartedLinkError if message.phase == _PARTED else LinkError
            raise kind(peer=message.block, reason=message.content.decode(errors="replace"))
        for _, _, raw in ancillary:
            fd = struct.unpack("i", raw[:4])[0]
            block = mapped(message.block, fd, message.room)
            block.close()  # the mapping is enough
            self.blocks[message.block] = block
        self.ended = max(self.ended, message.ended)
        return message

    def shut(self) -> None:
        """Free whoever waits here, on both sides."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.socket.close()


def _reason(problem: OSError) -> str:
    if isinstance(problem, BlockingIOError | TimeoutError):
        return "it was silent for the time limit"
    return str(problem)


def machine() -> str:
    """Names this machine and its network namespace: ranks that agree on it can be linked.

    Raises:
        OSError: This process may make no memory files, or cannot tell where it is.
    """
    os.close(os.memfd_create("probe", os.MFD_CLOEXEC))
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        boot = file.read().strip()
    spaces = " ".join(os.readlink(f"/proc/self/ns/{kind}") for kind in ("net", "user"))
    return f"{boot} {spaces} {os.geteuid()}"


def is_own(connected: socket.socket) -> bool:
    """Whether the process at the other end belongs to this process's user."""
    _, uid, _ = struct.unpack("3i", connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return bool(uid == os.geteuid())


class Door:
    """A listening socket under a name that only the ranks of one world are told."""

    def __init__(self) -> None:
        self.name = secrets.token_bytes(16)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(b"\0" + self.name)
        self._listener.listen(1024)

    def close(self) -> None:
        self._listener.close()

    def shut(self) -> None:
        """Free whoever waits in ``links``."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)

    def links(
        self, names: list[bytes], *, rank: int, timeout_s: float, kept: Callable[[Link], None]
    ) -> None:
        """Call lower ranks, answer higher ones; every link is handed to ``kept`` at once.

        Args:
            names: Doors of all ranks; all of them stand open.
            rank: This rank.
            timeout_s: Longest wait for a peer, here and at every later message.
            kept: Takes each link.

        Raises:
            LinkError: A peer did not come.
        """
        pair = struct.pack("ll", int(timeout_s), int(timeout_s % 1 * 1e6))
        limits = [(socket.SO_RCVTIMEO, pair), (socket.SO_SNDTIMEO, pair)]
        missing = set(range(rank + 1, len(names)))
        try:
            for peer in range(rank):
                caller = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                kept(Link(peer, caller))
                for option, value in limits:
                    caller.setsockopt(socket.SOL_SOCKET, option, value)
                caller.connect(b"\0" + names[peer])
                caller.send(struct.pack("i", rank))
            self._listener.setsockopt(socket.SOL_SOCKET, *limits[0])
            while missing:
                answered, _ = self._listener.accept()
                if not is_own(answered):  # names of local sockets can be listed by anybody
                    answered.close()
                    continue
                answered.setblocking(True)
                for option, value in limits:
                    answered.setsockopt(socket.SOL_SOCKET, option, value)
                peer = struct.unpack("i", answered.recv(4))[0]
                missing.remove(peer)
                kept(Link(peer, answered))
        except (OSError, KeyError, struct.error) as problem:
            raise LinkError(peer=min(missing, default=-1), reason=str(problem)) from problem
        finally:
            self._listener.close()
