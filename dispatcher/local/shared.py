"""``SharedExchange``: collectives between ranks of one node through shared memory.

A sender copies its content into a block of its own and tells the receivers the position; each
receiver copies its part out. Short content is sent in the message itself, long content in pieces so
that blocks stay small. Content in a ``shared_zeros`` buffer is read from there without a copy. Sums
always run in ascending rank order, so they are bit-identical on all ranks; large sums are divided
into one slice per rank.

Measured against gloo in ``benchmarks/exchange.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from dispatcher.exchange import Done, Exchange, Pending
from dispatcher.local.blocks import aligned, standing
from dispatcher.local.links import INLINE_BYTES, Link
from dispatcher.local.wire import Place, Wire

STAGE_BYTES = 8 << 20  # larger content is sent in pieces from two blocks of this size
_ONE_PHASE_BYTES = 1 << 16  # sums up to this size are computed in full on every rank
_CHUNK = 1 << 16  # elements summed at a time, so that they stay in the cache
_SUMMED = 2  # phase of a sum


def within_machine(exchange: Exchange, *, timeout_s: float = 300.0) -> Exchange:
    """Return a ``SharedExchange`` if all ranks are on one node, else ``exchange``. Collective.

    Args:
        exchange: An exchange that already connects the ranks.
        timeout_s: Longest wait for a peer in a collective, in seconds.

    Raises:
        LinkError: The ranks are on one node, but a peer did not connect.
    """
    if exchange.size == 1 or not can_share():
        return exchange
    shared = SharedExchange(exchange.rank, exchange.size)
    return shared if shared.connect(exchange, timeout_s=timeout_s) else exchange


def can_share() -> bool:
    """Return whether this system has memory files and abstract local sockets (Linux)."""
    return sys.platform.startswith("linux")


class SharedExchange:
    """Collectives over CPU tensors between processes of one node; see ``within_machine``.

    ``abort`` may be called from any thread and makes running collectives raise ``LinkError``, here
    and on the peers. After a failed collective the rank tells its peers which rank was the cause,
    and every further call raises.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._wire = Wire(rank, size)

    def connect(self, over: Exchange, *, timeout_s: float) -> bool:
        """Link all ranks. Returns False, on every rank, if they are not all on one node.

        Args:
            over: An exchange that already connects the ranks.
            timeout_s: Longest wait for a peer, here and in collectives, in seconds.

        Raises:
            LinkError: A peer did not connect, or ``abort`` was called.
        """
        return self._wire.connect(over, timeout_s=timeout_s)

    def abort(self) -> None:
        """Make every present and future collective raise ``LinkError``, here and on the peers."""
        self._wire.abort()

    def close(self) -> None:
        """Abort, and release sockets and memory."""
        self._wire.close()

    @property
    def staged_bytes(self) -> int:
        """Total size of the blocks that this rank sends from, in bytes."""
        return sum(block.size for block in self._wire.pool.blocks)

    def all_to_all(
        self,
        output: Tensor,
        input: Tensor,
        *,
        output_splits: Sequence[int],
        input_splits: Sequence[int],
        label: str,
    ) -> None:
        sent_N, sent = _parts(input, input_splits)
        got_N, got = _parts(output, output_splits)
        parts = [sent_N[begin:end] for begin, end in sent]
        rooms = [got_N[begin:end] for begin, end in got]
        number = self._wire.begin()
        own, into = parts[self.rank], rooms[self.rank]
        self._wire.check_sizes(self.rank, label, own.shape[0], into.shape[0])
        posting = _Posting(self._wire, number, label, sent_N, parts)
        missing = {link.peer: rooms[link.peer] for link in self._wire.peers}
        while missing or posting.is_going_on:
            posting.post()
            for link in self._wire.peers:
                if link.peer in missing:
                    room_N = missing.pop(link.peer)
                    size = self._wire.take(link, number, label, room_N, phase=2 * posting.round - 2)
                    if size < room_N.shape[0]:
                        missing[link.peer] = room_N[size:]
        into.copy_(own)
        posting.wait()
        self._wire.end(number)

    def all_gather(self, output: Tensor, input: Tensor, *, label: str) -> None:
        own_N, _ = _parts(input, None)
        all_N, _ = _parts(output, None)
        if all_N.shape[0] != self.size * own_N.shape[0]:
            raise ValueError(
                f"all_gather of {own_N.shape[0]} bytes from {self.size} ranks into "
                f"{all_N.shape[0]}; make room for all"
            )
        number = self._wire.begin()
        _post(self._wire, number, label, own_N)
        rows = all_N.view(self.size, -1)
        rows[self.rank].copy_(own_N)
        for link in self._wire.peers:
            self._wire.take(link, number, label, rows[link.peer])
        self._wire.end(number)

    def all_reduce(self, tensor: Tensor, *, label: str) -> None:
        self.start_all_reduce(tensor, label=label).wait()

    def start_all_reduce(self, tensor: Tensor, *, label: str) -> Pending:
        bytes_N, _ = _parts(tensor, None)
        if self.size == 1:
            return Done()
        wire, size = self._wire, bytes_N.shape[0]
        number = wire.begin()
        flat_M = tensor.detach().view(-1)
        if size <= _ONE_PHASE_BYTES:
            _post(wire, number, label, bytes_N)
            return _Sum(wire, number, label, flat_M)
        found = standing(bytes_N)
        if found is not None:
            place, shared_M = Place(*found, is_lent=True), flat_M
        else:
            place = Place(wire.block(size, number), 0, is_lent=False)
            shared_M = place.block.bytes_N[:size].view(tensor.dtype)
            begin, end = _slices(flat_M.shape[0], self.size)[self.rank]
            for part in (slice(0, begin), slice(end, None)):  # no other rank reads our own slice
                shared_M[part].copy_(flat_M[part])
        for link in wire.peers:
            wire.say(link, number, label, place=place, size=size)
        return _SlicedSum(wire, number, label, flat_M, shared_M)


class _Posting:
    """The sending side of an all-to-all: sends each peer its part, at once or in pieces."""

    def __init__(
        self, wire: Wire, number: int, label: str, whole_N: Tensor, parts: list[Tensor]
    ) -> None:
        self._wire, self._number, self._label = wire, number, label
        self._left = {link.peer: parts[link.peer] for link in wire.peers}
        total = sum(part.shape[0] for part in self._left.values())
        self._inline = total <= INLINE_BYTES
        self._found = None if self._inline else standing(whole_N)
        self._start = whole_N.data_ptr()
        in_pieces = self._found is None and total > STAGE_BYTES
        self._piece = STAGE_BYTES // (wire.size - 1) // 64 * 64 if in_pieces else max(total, 1)
        self._unread: dict[int, list[Link]] = {}  # by round: peers that have not acknowledged yet
        self._in_pieces = in_pieces
        self._blocks = [wire.block(STAGE_BYTES, number) for _ in range(2)] if in_pieces else []
        self.round = 0

    @property
    def is_going_on(self) -> bool:
        """Whether some content is still to be sent."""
        return bool(self._left)

    def post(self) -> None:
        """Send the next piece to every peer with content left; in the first round, to all peers."""
        turn, self.round = self.round, self.round + 1
        if not self._left:
            return
        if turn - 2 in self._unread:  # the block of that round is reused now
            self._wire.answered(
                self._unread.pop(turn - 2), self._number, self._label, phase=2 * (turn - 2)
            )
        pieces = {peer: part[: self._piece] for peer, part in self._left.items()}
        places = self._places(turn, pieces)
        links = [link for link in self._wire.peers if link.peer in pieces]
        for link in links:
            piece, part = pieces[link.peer], self._left.pop(link.peer)
            self._wire.say(
                link, self._number, self._label, phase=2 * turn, size=piece.shape[0],
                whole=part.shape[0], place=places.get(link.peer),
                content=piece.numpy().tobytes() if self._inline else b"",
            )  # fmt: skip
            if part.shape[0] > piece.shape[0]:
                self._left[link.peer] = part[piece.shape[0] :]
        lent = [link for link in links if link.peer in places and places[link.peer].is_lent]
        if lent:
            self._unread[turn] = lent

    def wait(self) -> None:
        """Wait until all lent content has been acknowledged."""
        for turn, links in self._unread.items():
            self._wire.answered(links, self._number, self._label, phase=2 * turn)
        for block in self._blocks:
            block.busy_until = 0  # free at once: all peers have acknowledged

    def _places(self, turn: int, pieces: dict[int, Tensor]) -> dict[int, Place]:
        """Position of each peer's piece; pieces outside shared memory are copied to a block."""
        filled = {peer: piece for peer, piece in pieces.items() if piece.shape[0]}
        if self._inline or not filled:
            return {}
        if self._found is not None:
            block, at = self._found
            begins = {peer: at + p.data_ptr() - self._start for peer, p in filled.items()}
            return {peer: Place(block, begin, is_lent=True) for peer, begin in begins.items()}
        sizes = [aligned(piece.shape[0]) for piece in filled.values()]
        if self._in_pieces:
            block = self._blocks[turn % 2]
        else:
            block = self._wire.block(sum(sizes), self._number)
        places = {}
        for (peer, piece), end, size in zip(filled.items(), accumulate(sizes), sizes, strict=True):
            places[peer] = Place(block, end - size, is_lent=self._in_pieces)
            block.bytes_N[end - size : end - size + piece.shape[0]].copy_(piece)
        return places


class _Sum:
    """A small sum in progress: every rank adds all contributions, in rank order."""

    def __init__(self, wire: Wire, number: int, label: str, flat_M: Tensor) -> None:
        self._wire, self._number, self._label, self._flat_M = wire, number, label, flat_M

    def wait(self) -> None:
        wire, flat_M = self._wire, self._flat_M
        size = flat_M.numel() * flat_M.element_size()
        parts: list[Tensor] = [flat_M] * wire.size
        for link in wire.peers:
            message = wire.hear(link, self._number, self._label, whole=size)
            parts[link.peer] = wire.content(link, message).view(flat_M.dtype)
        if size:
            flat_M.copy_(_in_rank_order(parts))
        wire.end(self._number)


class _SlicedSum:
    """A large sum in progress: every rank sums one slice, in rank order, and shares the result.

    ``shared_M`` is this rank's contribution as peers read it: the tensor itself or a copy.
    """

    def __init__(
        self, wire: Wire, number: int, label: str, flat_M: Tensor, shared_M: Tensor
    ) -> None:
        self._wire, self._number, self._label = wire, number, label
        self._flat_M, self._shared_M = flat_M, shared_M

    def wait(self) -> None:
        wire, number, label = self._wire, self._number, self._label
        flat_M, shared_M = self._flat_M, self._shared_M
        size = flat_M.numel() * flat_M.element_size()
        arrived, lenders = [flat_M] * wire.size, []
        for link in wire.peers:
            message = wire.hear(link, number, label, whole=size)
            lenders += [link] if message.is_lent else []
            arrived[link.peer] = wire.content(link, message).view(flat_M.dtype)
        slices = _slices(flat_M.shape[0], wire.size)
        begin, end = slices[wire.rank]
        for at in range(begin, end, _CHUNK):
            stop = min(at + _CHUNK, end)
            # Peers read this part of our memory only after the _SUMMED message below.
            shared_M[at:stop].copy_(_in_rank_order([part[at:stop] for part in arrived]))
        for link in wire.peers:
            wire.say(link, number, label, phase=_SUMMED)
        if shared_M is not flat_M:
            flat_M[begin:end].copy_(shared_M[begin:end])
        for link in wire.peers:
            wire.hear(link, number, label, whole=0, phase=_SUMMED)
            begin, end = slices[link.peer]
            flat_M[begin:end].copy_(arrived[link.peer][begin:end])
        for link in lenders:
            wire.say(link, number, label, phase=1)
        if shared_M is flat_M:  # the caller may write to the tensor next: wait for all readers
            wire.answered(wire.peers, number, label)
        wire.end(number)


def _post(wire: Wire, number: int, label: str, content_N: Tensor) -> None:
    """Send the same content to every peer."""
    size = content_N.shape[0]
    place, text = None, b""
    if size <= INLINE_BYTES:
        text = content_N.numpy().tobytes()
    else:
        place = Place(wire.block(size, number), 0, is_lent=False)
        place.block.bytes_N[:size].copy_(content_N)
    for link in wire.peers:
        wire.say(link, number, label, size=size, place=place, content=text)


def _slices(numel: int, size: int) -> list[tuple[int, int]]:
    """Each rank's slice of a sum as (begin, end), in elements."""
    step = -(-numel // (16 * size)) * 16
    return list(pairwise(min(i * step, numel) for i in range(size + 1)))


def _in_rank_order(parts: list[Tensor]) -> Tensor:
    """Return the sum of at least two parts, added in the given order, as a new tensor."""
    total_M = parts[0] + parts[1]
    for part_M in parts[2:]:
        total_M += part_M
    return total_M


def _parts(tensor: Tensor, splits: Sequence[int] | None) -> tuple[Tensor, list[tuple[int, int]]]:
    """Return a tensor's bytes, and the byte range of each rank's rows.

    Raises:
        ValueError: Not on the CPU, not contiguous, or the splits do not sum to the rows.
    """
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(
            f"shared memory takes contiguous CPU tensors, not {tuple(tensor.shape)} on "
            f"{tensor.device} with strides {tensor.stride()}"
        )
    bytes_N = tensor.detach().view(-1).view(torch.uint8)
    if splits is None:
        return bytes_N, []
    rows = tensor.shape[0]
    if sum(splits) != rows:
        raise ValueError(f"splits {list(splits)} for {rows} rows of {tuple(tensor.shape)}")
    row = bytes_N.shape[0] // rows if rows else 0
    ends = list(accumulate(splits))
    return bytes_N, [(row * (end - n), row * end) for end, n in zip(ends, splits, strict=True)]
