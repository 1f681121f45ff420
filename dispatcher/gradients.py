"""Sum the gradients of expert replicas and of dense parameters without a group per expert.

If one replica served all tokens of an expert, that replica sends its gradient to the others. If
several replicas served, each of them owns a slice of the expert's gradient row: the owner sums that
slice over all servers in ascending rank order, then sends the sum to every replica. If both of
exactly two replicas served, the home owns the whole row. A replica that served no tokens sends
nothing. A layer needs at most two all-to-alls; the first is skipped if no expert was spread.

Shapes: E experts, R ranks, S slots, P parameters in a row, M elements.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dispatcher.exchange import Exchange
from dispatcher.splits.routing import BoolArray, RoutingTable, expert_slots


def flat_all_reduce(flat_M: Tensor, exchange: Exchange, *, label: str = "dense_grad") -> None:
    """Sum a flat buffer over all ranks in place, bit-identical on all ranks."""
    if exchange.size > 1:
        exchange.all_reduce(flat_M, label=label)


def slots_for_exchange(table: RoutingTable) -> tuple[int, ...]:
    """Return a slot order in which home-mode gradients are sent and received without packing.

    Experts whose home is this rank come first, sorted by the ranks of their other replicas; then
    the other experts, sorted by home. With two replicas per expert, the all-to-alls read and write
    the gradient buffer directly; with more replicas, only in part.

    Returns:
        Experts by slot, -1 for empty slots, which come last.
    """
    row = table.slots_of(table.rank)
    held = sorted(expert for expert in row if expert >= 0)

    def place(expert: int) -> tuple[int, tuple[int, ...], int]:
        home = int(table.home_E[expert])
        others = tuple(r for r in table.ranks_of(expert) if r != home)
        at_home = home == table.rank
        return (0, others, expert) if at_home else (1, (home,), expert)

    return (*sorted(held, key=place), *[-1] * (len(row) - len(held)))


def home_served(table: RoutingTable) -> BoolArray:
    """Return the replicas that serve in home mode, bool [E, R]: each expert's home only."""
    served = torch.zeros(table.num_experts, table.num_ranks, dtype=torch.bool).numpy()
    served[range(table.num_experts), table.home_E] = True
    return served


def sum_replica_gradients(
    grad_SP: Tensor,
    table: RoutingTable,
    exchange: Exchange,
    *,
    served_ER: BoolArray | None = None,
    expert_of_slot: Sequence[int] | None = None,
    written: Collection[int] | None = None,
) -> None:
    """Sum each expert's gradient over its replicas, in place and bit-identical on all of them.

    Collective: every rank of ``exchange`` must call this function.

    Args:
        grad_SP: This rank's gradients, [S, P]; row s belongs to the expert in slot s.
        table: Replicas of the layer; the same on all ranks.
        exchange: Collectives over the ranks of ``table``.
        served_ER: Replicas that served tokens in this step, bool [E, R], the same on all ranks.
            Rows of experts that no replica served must be zero. None: home mode.
        expert_of_slot: Experts in this rank's slots; None: in the table's order.
        written: Slots whose rows the backward wrote in this step (see ``expert_path``). Pass them
            if the buffer is not zeroed before each step: every other row is then zeroed or
            overwritten. None: rows that were not written are already zero.
    """
    served = home_served(table) if served_ER is None else served_ER
    slots = table.slots_of(table.rank) if expert_of_slot is None else expert_of_slot
    if written is not None:
        for slot, expert in enumerate(slots):
            comes = expert >= 0 and served[expert].any() and not served[expert, exchange.rank]
            if slot not in written and not comes:
                grad_SP[slot].zero_()
    if exchange.size == 1 or not grad_SP.shape[1]:  # all experts are frozen
        return
    slot_of = expert_slots(slots)
    pieces = _pieces(table, served, row_numel=grad_SP.shape[1])
    spread = [piece for piece in pieces if len(piece.servers) > 1]
    if spread:
        _reduce_slices(grad_SP, spread, slot_of, exchange)
    if any(len(piece.holders) > 1 for piece in pieces):
        _copy_to_holders(grad_SP, pieces, slot_of, exchange)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Elements ``begin`` to ``end`` of an expert's row; rank ``owner`` sums and sends them."""

    expert: int
    owner: int
    begin: int
    end: int
    servers: tuple[int, ...]
    holders: tuple[int, ...]

    def of(self, grad_SP: Tensor, slot_of: dict[int, int]) -> Tensor:
        """Return the piece as a view of this rank's buffer."""
        return grad_SP[slot_of[self.expert], self.begin : self.end]


def _pieces(table: RoutingTable, served_ER: BoolArray, *, row_numel: int) -> list[_Piece]:
    pieces = []
    for expert, row in enumerate(served_ER.tolist()):
        servers = tuple(rank for rank, serves in enumerate(row) if serves)
        holders = table.ranks_of(expert)
        owners = servers
        if len(servers) == len(holders) == 2:
            # Same number of bytes as with halves, and rows need no packing, as in home mode.
            owners = (int(table.home_E[expert]),)
        for i, owner in enumerate(owners):
            begin, end = (row_numel * k // len(owners) for k in (i, i + 1))
            pieces.append(_Piece(expert, owner, begin, end, servers, holders))
    return pieces


def _reduce_slices(
    grad_SP: Tensor, pieces: list[_Piece], slot_of: dict[int, int], exchange: Exchange
) -> None:
    """Send each slice to its owner, and sum the owned slices in ascending rank order."""
    me, ranks = exchange.rank, range(exchange.size)
    mine = [p for p in pieces if me in p.servers]
    owned = [p for p in pieces if p.owner == me]
    send = [[p for p in mine if p.owner == to and to != me] for to in ranks]
    receive = [[p for p in owned if peer in p.servers and peer != me] for peer in ranks]
    arrived = _exchanged(grad_SP, send, receive, slot_of, exchange)
    parts: dict[tuple[int, int], Tensor] = {}
    begin = 0
    for peer, from_peer in enumerate(receive):
        for piece in from_peer:
            end = begin + piece.end - piece.begin
            parts[piece.expert, peer] = arrived[begin:end]
            begin = end
    for piece in owned:
        here = piece.of(grad_SP, slot_of)
        parts[piece.expert, me] = here
        first, second, *others = (parts[piece.expert, server] for server in piece.servers)
        total = torch.add(first, second, out=None if me in piece.servers[2:] else here)
        for part in others:
            total += part
        if total is not here:
            here.copy_(total)


def _copy_to_holders(
    grad_SP: Tensor, pieces: list[_Piece], slot_of: dict[int, int], exchange: Exchange
) -> None:
    """Send owned pieces to all other ranks that hold the expert, and receive theirs."""
    me, ranks = exchange.rank, range(exchange.size)
    owned = [p for p in pieces if p.owner == me]
    held = [p for p in pieces if me in p.holders]
    send = [[p for p in owned if peer in p.holders and peer != me] for peer in ranks]
    receive = [[p for p in held if p.owner == peer and peer != me] for peer in ranks]
    places = [p.of(grad_SP, slot_of) for from_peer in receive for p in from_peer]
    straight = _joined(places) if places else grad_SP.new_empty(0)
    if straight is not None:
        _exchanged(grad_SP, send, receive, slot_of, exchange, into=straight)
        return
    arrived = _exchanged(grad_SP, send, receive, slot_of, exchange)
    for place, part in zip(places, torch.split(arrived, [p.numel() for p in places]), strict=True):
        place.copy_(part)


def _exchanged(
    grad_SP: Tensor,
    send: list[list[_Piece]],
    receive: list[list[_Piece]],
    slot_of: dict[int, int],
    exchange: Exchange,
    *,
    into: Tensor | None = None,
) -> Tensor:
    """Run one all-to-all of the pieces; returns the received elements by source rank.

    Pieces that are adjacent in the buffer are sent from there without packing.
    """
    parts = [p.of(grad_SP, slot_of) for to_peer in send for p in to_peer]
    packed = _joined(parts) if parts else grad_SP.new_empty(0)
    if packed is None:
        packed = torch.cat(parts)
    arrived = into
    if arrived is None:
        arrived = grad_SP.new_empty(sum(_numel(from_peer) for from_peer in receive))
    exchange.all_to_all(
        arrived,
        packed,
        output_splits=[_numel(from_peer) for from_peer in receive],
        input_splits=[_numel(to_peer) for to_peer in send],
        label="replica_grad",
    )
    return arrived


def _joined(parts: list[Tensor]) -> Tensor | None:
    """Return the parts as one view if they are adjacent in memory, in order; else None."""
    end = parts[0].storage_offset()
    for part in parts:
        if part.storage_offset() != end:
            return None
        end += part.numel()
    first = parts[0]
    return first.as_strided((end - first.storage_offset(),), (1,))


def _numel(pieces: list[_Piece]) -> int:
    return sum(p.end - p.begin for p in pieces)
