"""Sums dense gradients unit by unit in an order that no number of ranks changes.

The units of a step (see ``lazarus.data.units``) are dealt to V chains: chain v adds the gradients
of the units v, v + V, v + 2 V and so on, in this order, and the step's gradient is the sum of the
chains in their order. With one chain this is what ``loss.backward()`` for one unit after another
gives in a single process.

Where the number of ranks R divides V, all units of a chain are computed by one rank, which adds
them up alone; the chains are summed once a step, as many bytes as an all-reduce. Otherwise each
rank adds up one slice of all chains, and the ranks exchange slices in every round.

Shapes: P elements of the dense gradient, V chains, R ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dispatcher.exchange import Exchange
from lazarus.data.units import Units


class DenseChains:
    """Has the same face as ``DenseSync``, whose place it takes; sums nothing during a backward.

    Args:
        flat_grad: The gradient of one unit after each backward, [P]; the step's gradient at last.
        units: The units of a step.
        num_chains: V. More chains save traffic where the number of ranks divides V, and cost
            memory: V / R gradient buffers for each rank.
    """

    overlaps = False

    def __init__(self, flat_grad: Tensor, units: Units, *, num_chains: int = 1) -> None:
        self._flat_grad, self._units, self._num_chains = flat_grad, units, num_chains
        self._sums: dict[int, Tensor] = {}  # by chain: a whole gradient, or this rank's slice
        self._spare: dict[tuple[int, int], Tensor] = {}  # buffers to use again, by size and chain

    def begin_generation(self) -> None:
        """Forget the buffers of a generation with another number of ranks."""
        self._spare.clear()
        self.start_step()

    def start_step(self) -> None:
        """Forget what an abandoned attempt has summed."""
        self._sums = {}

    def arm(self) -> None:
        """Do nothing: no sum begins during a backward."""

    def pass_layer(self, exchange: Exchange) -> None:
        """Do nothing: no sum begins during a backward."""

    def agree(self, exchange: Exchange) -> None:
        """Do nothing: the order of sums is fixed."""

    def wait(self) -> None:
        """Return at once: ``finish`` is blocking."""

    @torch.no_grad()
    def unit_done(self, exchange: Exchange, number: int) -> None:
        """Add the gradients that the ranks computed in round ``number``, and zero the buffer."""
        if not self._flat_grad.numel():  # no dense parameter is trained
            return
        first = number * exchange.size
        if self._is_local(exchange):
            self._add(first + exchange.rank, self._flat_grad)
        else:
            for rank, slice_Q in enumerate(_slices_of_all(self._flat_grad, exchange)):
                self._add(first + rank, slice_Q)
        self._flat_grad.zero_()

    @torch.no_grad()
    def finish(self, exchange: Exchange) -> DenseChains:
        """Put the sum of all chains into the buffer, equal on all ranks."""
        if not self._flat_grad.numel():
            return self
        if exchange.size == 1:
            self._flat_grad.copy_(_in_order([self._sums[v] for v in sorted(self._sums)]))
            return self
        size = _slice_size(self._flat_grad, exchange)
        if self._is_local(exchange):
            own_Q = self._own_slice(exchange, size)
        else:
            own_Q = _in_order([self._sums[v] for v in sorted(self._sums)])
        whole = own_Q.new_empty(exchange.size * size)
        exchange.all_gather(whole, own_Q.contiguous(), label="dense_grad")
        self._flat_grad.copy_(whole[: self._flat_grad.numel()])
        return self

    def _is_local(self, exchange: Exchange) -> bool:
        return self._num_chains % exchange.size == 0

    def _add(self, unit: int, gradient: Tensor) -> None:
        """Add one unit's gradient to its chain. The first is copied, as torch's first gradient."""
        if unit >= self._units.count:
            return
        chain = unit % self._num_chains
        if chain in self._sums:
            self._sums[chain].add_(gradient)
            return
        key = gradient.numel(), chain
        if key not in self._spare:
            self._spare[key] = torch.empty_like(gradient)
        self._sums[chain] = self._spare[key].copy_(gradient)

    def _own_slice(self, exchange: Exchange, size: int) -> Tensor:
        """This rank's slice of the sum of all chains, which lie whole on different ranks."""
        ranks, used = exchange.size, min(self._num_chains, self._units.count)
        mine = sorted(self._sums)
        sent = self._flat_grad.new_zeros(ranks, len(mine), size)
        for at, chain in enumerate(mine):
            _padded(sent[:, at], self._sums[chain])
        held = [len(range(rank, used, ranks)) for rank in range(ranks)]
        arrived = sent.new_empty(sum(held) * size)
        exchange.all_to_all(
            arrived,
            sent.view(-1),
            output_splits=[number * size for number in held],
            input_splits=[len(mine) * size] * ranks,
            label="dense_grad",
        )
        rows = arrived.view(-1, size)
        begins = [sum(held[:rank]) for rank in range(ranks)]
        return _in_order([rows[begins[v % ranks] + v // ranks] for v in range(used)])


def _in_order(parts: list[Tensor]) -> Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        total.add_(part)
    return total


def _slice_size(flat: Tensor, exchange: Exchange) -> int:
    return -(-flat.numel() // exchange.size)


def _padded(into: Tensor, flat: Tensor) -> None:
    """Copy ``flat`` [P] into ``into`` [R, Q], row by row; what lies behind P is left alone."""
    ranks, size = into.shape
    for rank in range(ranks):
        part = flat[rank * size : (rank + 1) * size]
        into[rank, : part.numel()] = part


def _slices_of_all(flat: Tensor, exchange: Exchange) -> Tensor:
    """This rank's slice of every rank's buffer, [R, Q]."""
    ranks, size = exchange.size, _slice_size(flat, exchange)
    if ranks == 1:
        return flat.view(1, -1)
    sent = flat.new_zeros(ranks, size)
    _padded(sent, flat)
    arrived = torch.empty_like(sent)
    splits = [size] * ranks
    exchange.all_to_all(
        arrived.view(-1),
        sent.view(-1),
        output_splits=splits,
        input_splits=splits,
        label="dense_grad",
    )
    return arrived
