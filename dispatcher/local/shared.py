"""The exchange between ranks of one machine: through shared memory, without a network stack.

A sender copies what others want into a block of its own and says where it lies; each receiver
copies its part out. Short content travels in the message itself, long content in pieces, so that
blocks stay small; content that lies in ``shared_zeros`` is read from there. A sum is made by
slices, each by one rank, in ascending rank order: equal bits on all ranks, whatever the size.

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

STAGE_BYTES = 8 << 20  # of one block; more is sent in pieces from two of them in turn
_ONE_PHASE_BYTES = 1 << 16  # sums up to this size: everybody reads everything
_CHUNK = 1 << 16  # elements that are summed at a time, to stay in the cache
_SUMMED = 2  # phase of a sum


def within_machine(exchange: Exchange, *, timeout_s: float = 300.0) -> Exchange:
    """A faster exchange where all ranks share a machine, else the given one, on every rank alike.

    Args:
        exchange: Connects the ranks already; used to agree.
        timeout_s: Longest wait for a peer in a collective.
    """
    if exchange.size == 1 or not can_share():
        return exchange
    shared = SharedExchange(exchange.rank, exchange.size)
    return shared if shared.connect(exchange, timeout_s=timeout_s) else exchange


def can_share() -> bool:
    """Whether this system has memory files and local sockets without a name on disk."""
    return sys.platform.startswith("linux")


class SharedExchange:
    """Collectives over CPU tensors between processes of one machine; see ``within_machine``.

    ``abort`` may be called by any thread: it ends every collective under way with a ``LinkError``,
    here and on the peers. A rank whose collective failed tells its peers for whom it gave up, and
    can use the exchange no more.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._wire = Wire(rank, size)

    def connect(self, over: Exchange, *, timeout_s: float) -> bool:
        """Link all ranks; False, on every rank, where they are not on one machine.

        Raises:
            LinkError: A peer did not come, or ``abort`` was called.
        """
        return self._wire.connect(over, timeout_s=timeout_s)

    def abort(self) -> None:
        """End every collective here and on the peers, now and from now on."""
        self._wire.abort()

    def close(self) -> None:
        """Abort and give sockets and memory back."""
        self._wire.close()

    @property
    def staged_bytes(self) -> int:
        """Bytes of the blocks that this rank sends from."""
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
            for part in (slice(0, begin), slice(end, None)):  # our own slice nobody else sums
                shared_M[part].copy_(flat_M[part])
        for link in wire.peers:
            wire.say(link, number, label, place=place, size=size)
        return _SlicedSum(wire, number, label, flat_M, shared_M)


class _Posting:
    """This rank's side of an all-to-all: its parts go out, all at once or piece by piece."""

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
        self._unread: dict[int, list[Link]] = {}  # by round: who has not said that it has read
        self._in_pieces = in_pieces
        self._blocks = [wire.block(STAGE_BYTES, number) for _ in range(2)] if in_pieces else []
        self.round = 0

    @property
    def is_going_on(self) -> bool:
        """Whether a further round has something to post."""
        return bool(self._left)

    def post(self) -> None:
        """The next piece for every peer that lacks one; the first round speaks to all."""
        turn, self.round = self.round, self.round + 1
        if not self._left:
            return
        if turn - 2 in self._unread:  # its block is needed again
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
        """Until all that was lent has been read."""
        for turn, links in self._unread.items():
            self._wire.answered(links, self._number, self._label, phase=2 * turn)
        for block in self._blocks:
            block.busy_until = 0  # at once: all have answered

    def _places(self, turn: int, pieces: dict[int, Tensor]) -> dict[int, Place]:
        """Where each peer finds its piece; copies it there unless it lies there already."""
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
    """A small sum under way: every rank adds up everything, in rank order."""

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
    """A large sum under way: every rank adds up its slice, in rank order, and hands it out.

    ``shared_M`` is what peers see of this rank: the tensor itself, or a copy of what they need.
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
            # Peers read this stretch of ours only when they are told that it holds the sum.
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
        if shared_M is flat_M:  # the caller may write to it: nobody may be reading any more
            wire.answered(wire.peers, number, label)
        wire.end(number)


def _post(wire: Wire, number: int, label: str, content_N: Tensor) -> None:
    """The same to every peer."""
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
    """Each rank's stretch of a sum, in elements."""
    step = -(-numel // (16 * size)) * 16
    return list(pairwise(min(i * step, numel) for i in range(size + 1)))


def _in_rank_order(parts: list[Tensor]) -> Tensor:
    """Sum in ascending order, in a tensor of its own."""
    total_M = parts[0] + parts[1]
    for part_M in parts[2:]:
        total_M += part_M
    return total_M


def _parts(tensor: Tensor, splits: Sequence[int] | None) -> tuple[Tensor, list[tuple[int, int]]]:
    """A tensor's bytes, and where in them the rows for each rank lie.

    Raises:
        ValueError: Not on the CPU, not contiguous, or other rows than the splits say.
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
