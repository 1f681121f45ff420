"""Local sockets between the ranks of one node.

A link carries short messages in order. A message that refers to a block new to the peer also
carries the block's file descriptor. If a peer dies or leaves, its link closes, and ranks that wait
for the peer get an error at once.
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

INLINE_BYTES = 4096  # content up to this size is sent in the message itself
_PARTING = -1  # number of the last message of a rank that gives up; collectives count from 1
LABEL_BYTES = 64  # longer labels are cut
_PARTED = 1  # phase of a last message: ranks are in different collectives
_HEAD = struct.Struct(f"<qq{LABEL_BYTES}sIqqqqq?")
_ANCILLARY = socket.CMSG_SPACE(4)


@dataclass(slots=True)
class Message:
    """A message from one rank to another about one collective.

    Attributes:
        number: Number of the collective; all ranks count the same.
        ended: The last collective that the sender has ended, together with all earlier ones.
        label: Label of the collective, padded with zeros.
        phase: Even: part of the collective that the content belongs to. Odd: acknowledgement that
            the content of phase - 1 was read.
        block: Number of the sender's block that holds the content; -1 if there is none.
        begin: Offset of the content in the block, in bytes.
        size: Size of the content, in bytes.
        whole: Bytes that the sender still has for the peer, including this content.
        room: Size of the block, in bytes.
        is_lent: The sender waits for an acknowledgement before it rewrites the content.
        content: The content itself if it is short.
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
    """The socket to one peer, the blocks known on both sides, and messages received early."""

    peer: int
    socket: socket.socket
    mapped: set[int] = field(default_factory=set)  # numbers of our blocks that the peer has mapped
    blocks: dict[int, Block] = field(default_factory=dict)  # blocks of the peer by number
    early: dict[tuple[int, int], Message] = field(default_factory=dict)
    ended: int = 0  # the last collective that the peer has ended

    def send(self, message: Message, block: Block | None) -> None:
        """Send a message; ``block`` holds its content, if any.

        Raises:
            LinkError: The peer is gone or does not read; or the peer gave up because of another
                rank, which the error then names.
        """
        head = _HEAD.pack(
            message.number, message.ended, message.label, message.phase, message.block,
            message.begin, message.size, message.whole, message.room, message.is_lent,
        )  # fmt: skip
        try:
            if block is not None and block.number not in self.mapped:
                socket.send_fds(self.socket, [head], [block.fd])
                self.mapped.add(block.number)
            else:
                self.socket.send(head + message.content)
        except OSError as problem:
            known = self._blamed()
            raise known or LinkError(peer=self.peer, reason=_reason(problem)) from problem

    def part(self, problem: LinkError) -> None:
        """Tell the peer because of whom this rank gives up, and shut the link. Does not block."""
        is_parted = isinstance(problem, PartedLinkError)
        if is_parted or problem.peer != self.peer:
            phase = _PARTED if is_parted else 0
            head = _HEAD.pack(_PARTING, 0, b"", phase, problem.peer, 0, 0, 0, 0, False)
            with suppress(OSError):
                text = problem.reason.encode()[:INLINE_BYTES]
                self.socket.send(head + text, socket.MSG_DONTWAIT)
        self.shut()

    def _blamed(self) -> LinkError | None:
        """The error in the last message of a peer that gave up because of another rank, or None."""
        try:
            while True:
                self._next(socket.MSG_DONTWAIT)
        except LinkError as last:
            is_other = last.peer != self.peer or isinstance(last, PartedLinkError)
            return last if is_other else None

    def receive(self, number: int, phase: int) -> Message:
        """Wait for the peer's message with this number and phase; keep other messages for later.

        Raises:
            LinkError: The peer is gone or was silent for the time limit; or the peer gave up
                because of another rank, which the error then names.
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
        """Wake up threads that wait on this link, on both sides, with an error."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.socket.close()


def _reason(problem: OSError) -> str:
    if isinstance(problem, BlockingIOError | TimeoutError):
        return "it was silent for the time limit"
    return str(problem)


def machine() -> str:
    """Return a name of this node, its namespaces and user; ranks with equal names can be linked.

    Raises:
        OSError: Memory files are not allowed here, or the node cannot be identified.
    """
    os.close(os.memfd_create("probe", os.MFD_CLOEXEC))
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        boot = file.read().strip()
    spaces = " ".join(os.readlink(f"/proc/self/ns/{kind}") for kind in ("net", "user"))
    return f"{boot} {spaces} {os.geteuid()}"


def is_own(connected: socket.socket) -> bool:
    """Return whether the process at the other end belongs to the same user."""
    _, uid, _ = struct.unpack("3i", connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return bool(uid == os.geteuid())


class Door:
    """A listening socket whose random name is shared only with the ranks of one exchange."""

    def __init__(self) -> None:
        self.name = secrets.token_bytes(16)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(b"\0" + self.name)
        self._listener.listen(1024)

    def close(self) -> None:
        self._listener.close()

    def shut(self) -> None:
        """Wake up a thread that waits in ``links``, with an error."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)

    def links(
        self, names: list[bytes], *, rank: int, timeout_s: float, kept: Callable[[Link], None]
    ) -> None:
        """Connect to lower ranks and accept higher ranks; then stop listening.

        Args:
            names: Socket names of all ranks, by rank; all of them are listening already.
            rank: This rank.
            timeout_s: Longest wait for a peer, here and for every later message, in seconds.
            kept: Called with each link as soon as its socket exists.

        Raises:
            LinkError: A peer did not connect.
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
                if not is_own(answered):  # any user can list the names of local sockets
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
