"""Transfer of expert records and dense state between ranks, in collective rounds of bounded size.

All ranks that take part (feeders) know the whole schedule, so a round is one uneven all-to-all of
bytes. Each piece has a header with its name, generation, step and checksum, which the receiver
verifies before it uses the piece. The loss of a rank ends a round like any collective.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor

from dispatcher.exchange import Exchange
from lazarus.control.messages import Move, Prepare
from lazarus.errors import TransferError
from lazarus.runtime.state.flat_bytes import DenseImage

ROUND_BYTES = 32 << 20  # a rank sends about this many bytes in one round
_HEADER = struct.Struct("<qqiiq16s16x")  # generation, step, layer, expert or -1, offset, xxh3_128

Expert = tuple[int, int]
ReadRecord = Callable[[int, int], Tensor]
RecordBytes = Callable[[int], int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A range of bytes to send from rank ``source`` to rank ``target``; layer -1: dense image."""

    source: int
    target: int
    layer: int
    expert: int
    offset: int
    num_bytes: int

    @property
    def name(self) -> str:
        """The piece's name in error messages."""
        return f"L{self.layer}/E{self.expert}" if self.layer >= 0 else f"dense+{self.offset}"


def expert_pieces(moves: Sequence[Move], *, record_bytes: RecordBytes) -> list[Piece]:
    """One piece for each expert record to move; ``record_bytes`` gives a record's size by layer."""
    return [
        Piece(
            source=move.source,
            target=move.target,
            layer=move.layer,
            expert=move.expert,
            offset=0,
            num_bytes=record_bytes(move.layer),
        )
        for move in moves
    ]


def dense_pieces(sources: Sequence[int], targets: Sequence[int], *, num_bytes: int) -> list[Piece]:
    """Pieces that give every target the whole dense image, a part of it from each source."""
    share = -(-num_bytes // max(1, len(sources)))
    pieces = []
    for target in targets:
        for index, source in enumerate(sources):
            start, stop = index * share, min(num_bytes, (index + 1) * share)
            for offset in range(start, stop, ROUND_BYTES):
                size = min(ROUND_BYTES, stop - offset)
                pieces.append(
                    Piece(
                        source=source,
                        target=target,
                        layer=-1,
                        expert=-1,
                        offset=offset,
                        num_bytes=size,
                    )
                )
    return pieces


def rounds_of(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Cut the schedule, in order; no rank sends or receives much over ROUND_BYTES in a round."""
    current: list[Piece] = []
    load: dict[tuple[str, int], int] = {}
    for piece in pieces:
        ends = (("out", piece.source), ("in", piece.target))
        if current and any(load.get(end, 0) + piece.num_bytes > ROUND_BYTES for end in ends):
            yield current
            current, load = [], {}
        current.append(piece)
        for end in ends:
            load[end] = load.get(end, 0) + piece.num_bytes
    if current:
        yield current


class TransferRun:
    """One rank's part in the transfers of one generation.

    Attributes:
        staged: Verified expert records, by layer and expert, that have no slot yet.
        bytes_received: Bytes received so far.
    """

    def __init__(
        self,
        prepare: Prepare,
        exchange: Exchange,
        *,
        read_record: ReadRecord,
        dense: DenseImage,
        record_bytes: RecordBytes,
        device: torch.device | None = None,
    ) -> None:
        """``device``: device of the tensors that ``exchange`` takes; None means the CPU."""
        self._device = device or torch.device("cpu")
        self._order = prepare
        self._exchange = exchange
        self._read_record = read_record
        self._dense = dense
        self._record_bytes = record_bytes
        self.staged: dict[Expert, Tensor] = {}
        self.bytes_received = 0

    def run(self) -> None:
        """Run all transfers that come before RESUME.

        Raises:
            TransferError: A piece arrived damaged or is not the expected piece.
        """
        order = self._order
        pieces = dense_pieces(
            order.dense_sources, order.dense_targets, num_bytes=self._dense.num_bytes
        ) + expert_pieces(order.moves, record_bytes=self._record_bytes)
        for batch in rounds_of(pieces):
            self.run_round(batch)

    def run_round(self, pieces: Sequence[Piece]) -> None:
        """Send and receive the pieces of one round in one all-to-all.

        Raises:
            TransferError: A piece arrived damaged or is not the expected piece.
        """
        rank, size = self._exchange.rank, self._exchange.size
        outgoing = sorted((p for p in pieces if p.source == rank), key=lambda p: p.target)
        incoming = sorted((p for p in pieces if p.target == rank), key=lambda p: p.source)
        sent = [chunk for piece in outgoing for chunk in self._packed(piece)]
        sent_bytes = torch.cat(sent) if sent else torch.empty(0, dtype=torch.uint8)
        total = sum(_HEADER.size + piece.num_bytes for piece in incoming)
        arrived = torch.empty(total, dtype=torch.uint8, device=self._device)
        self._exchange.all_to_all(
            arrived,
            sent_bytes.to(self._device),
            output_splits=_splits(incoming, size, lambda piece: piece.source),
            input_splits=_splits(outgoing, size, lambda piece: piece.target),
            label="transfer",
        )
        received = arrived.cpu()
        start = 0
        for piece in incoming:
            stop = start + _HEADER.size + piece.num_bytes
            self._take(piece, received[start:stop])
            start = stop

    def _packed(self, piece: Piece) -> tuple[Tensor, Tensor]:
        if piece.layer >= 0:
            content = self._read_record(piece.layer, piece.expert)
        else:
            content = self._dense.read(piece.offset, piece.offset + piece.num_bytes).cpu()
        head = self._header(piece, xxhash.xxh3_128_digest(content.numpy().data))
        return torch.frombuffer(bytearray(head), dtype=torch.uint8), content

    def _header(self, piece: Piece, checksum: bytes) -> bytes:
        order = self._order
        return _HEADER.pack(
            order.generation, order.step, piece.layer, piece.expert, piece.offset, checksum
        )

    def _take(self, piece: Piece, received: Tensor) -> None:
        head = received[: _HEADER.size].numpy().tobytes()
        content = received[_HEADER.size :]
        checksum = xxhash.xxh3_128_digest(content.numpy().data)
        if head != self._header(piece, checksum):
            got = _HEADER.unpack(head)
            wanted = f"generation {self._order.generation} step {self._order.step}"
            raise TransferError(
                what=piece.name,
                source=f"feeder {piece.source}",
                reason=f"header or checksum differs: got {got[:5]}, wanted {wanted}",
            )
        self.bytes_received += piece.num_bytes
        if piece.layer >= 0:
            self.staged[(piece.layer, piece.expert)] = content.clone()
        else:
            self._dense.write(piece.offset, content)


def _splits(pieces: Sequence[Piece], size: int, peer: Callable[[Piece], int]) -> list[int]:
    splits = [0] * size
    for piece in pieces:
        splits[peer(piece)] += _HEADER.size + piece.num_bytes
    return splits
