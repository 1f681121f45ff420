"""``Dispatcher``: send tokens to experts and combine the results, around any expert function.

Use this interface for expert modules of your own. Lazarus's layers use ``expert_path``, which also
stores the experts' tensors and differentiates them.

Shapes: T tokens, K choices, N copies sent, M rows received, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dispatcher.eager import runs_eagerly
from dispatcher.errors import HandleError
from dispatcher.exchange import Exchange
from dispatcher.layer.compute import Group
from dispatcher.layer.dispatch import Routed, route
from dispatcher.layer.path import (
    combine_copies,
    gather_copies,
    output_gradients,
    refuse_second_order,
    sum_copies,
)
from dispatcher.splits.routing import RoutingTable
from dispatcher.splits.split import SplitRule


@dataclass(frozen=True, kw_only=True, eq=False)
class Dispatched:
    """Rows that arrived at this rank, [M, D], grouped by expert. Valid for one ``combine``."""

    rows_MD: Tensor
    routed: Routed

    @property
    def generation(self) -> int:
        """Generation of the routing table that the dispatch used."""
        return self.routed.generation

    @property
    def groups(self) -> tuple[Group, ...]:
        """Slot and row range of each expert that received rows, in order of expert ids."""
        return self.routed.groups

    def with_rows(self, rows_MD: Tensor) -> Dispatched:
        """Return a copy of the dispatch that holds the experts' output instead of their input.

        Args:
            rows_MD: Output rows in the same order, [M, any width].

        Raises:
            ValueError: The number of rows differs.
        """
        if rows_MD.shape[0] != self.rows_MD.shape[0]:
            raise ValueError(f"{rows_MD.shape[0]} rows for a dispatch of {self.rows_MD.shape[0]}")
        return replace(self, rows_MD=rows_MD)

    def map(self, expert: Callable[[int, Tensor], Tensor]) -> Dispatched:
        """Apply ``expert(slot, rows)`` to each group; it must keep the number of rows."""
        if not self.groups:
            return self
        parts = [expert(g.slot, self.rows_MD[g.begin : g.end]) for g in self.groups]
        return self.with_rows(torch.cat(parts))


class Dispatcher:
    """Sends tokens to the ranks that hold their experts and brings the results back.

    ``dispatch`` and ``combine`` are collective: every rank must call them in the same order, even
    with no tokens, and must run the backward pass if any rank does.

    Args:
        table: Replicas of the layer, made for this rank.
        exchange: Collectives over the ranks of ``table``.
        rule: How each expert's tokens are split over its replicas. None: all go to the home
            replica. Choose "balanced" if a hot expert's home rank becomes the bottleneck.
        expert_of_slot: Experts in this rank's slots, if they are not in the table's order (see
            ``slots_for_exchange``); pass the same to ``sum_replica_gradients``.

    Raises:
        ValueError: ``table`` and ``exchange`` differ in rank or number of ranks.
    """

    def __init__(
        self,
        table: RoutingTable,
        *,
        exchange: Exchange,
        rule: SplitRule | None = None,
        expert_of_slot: Sequence[int] | None = None,
    ) -> None:
        self._exchange = exchange
        self._rule = rule or SplitRule()
        self.update(table, expert_of_slot=expert_of_slot)

    @property
    def table(self) -> RoutingTable:
        """The routing table in force."""
        return self._table

    @property
    def expert_of_slot(self) -> tuple[int, ...]:
        """Experts in this rank's slots, -1 for an empty slot."""
        return self._expert_of_slot

    def update(self, table: RoutingTable, *, expert_of_slot: Sequence[int] | None = None) -> None:
        """Use another table from now on. Handles of another generation can no longer be combined.

        Args:
            table: The new table, for the same rank and number of ranks.
            expert_of_slot: Experts in this rank's slots; None: in the table's order.

        Raises:
            ValueError: ``table`` and the exchange differ in rank or number of ranks.
        """
        self._table = self._fitting(table)
        slots = table.slots_of(table.rank) if expert_of_slot is None else expert_of_slot
        self._expert_of_slot = tuple(slots)

    @runs_eagerly
    def dispatch(self, x_TD: Tensor, expert_TK: Tensor) -> Dispatched:
        """Send each token to its chosen experts. Collective and differentiable.

        Args:
            x_TD: Tokens [T, D], floating point. They must require a gradient on all ranks or on
                none.
            expert_TK: Chosen experts, int64 [T, K]; -1 sends no copy.

        Returns:
            The rows that this rank's experts received.

        Raises:
            DispatchInputError: Wrong dtype, shape, device, ids or slots on this rank.
            PeerInputError: Wrong input on another rank; nothing was dispatched.
            RankMismatchError: The ranks' tokens differ in width or dtype, or their tables in
                generation; nothing was dispatched.
            RanksPartedError: The ranks are in different collectives.
        """
        routed = route(
            x_TD, expert_TK, table=self._table, exchange=self._exchange, rule=self._rule,
            expert_of_slot=self._expert_of_slot,
        )  # fmt: skip
        rows_MD: Tensor = _ToExperts.apply(x_TD, routed)  # type: ignore[no-untyped-call]
        return Dispatched(rows_MD=rows_MD, routed=routed)

    @runs_eagerly
    def combine(self, dispatched: Dispatched, weight_TK: Tensor) -> Tensor:
        """Return the weighted sum of each token's expert outputs. Collective and differentiable.

        Args:
            dispatched: Result of ``dispatch`` with the experts' outputs (``with_rows`` or ``map``).
            weight_TK: Weight of each choice, floating point [T, K].

        Returns:
            [T, D] in the dtype of the outputs; zeros for tokens that were sent nowhere.

        Raises:
            DispatchInputError: The weights have the wrong shape, dtype or device.
            HandleError: ``dispatched`` was already combined, or is of another generation.
        """
        if dispatched.generation != self._table.generation:
            raise HandleError(
                f"the dispatcher is at generation {self._table.generation}",
                generation=dispatched.generation,
            )
        dispatched.routed.check_weights(weight_TK)
        dispatched.routed.spend()
        result: Tensor = _Combine.apply(  # type: ignore[no-untyped-call]
            dispatched.rows_MD, weight_TK, dispatched.routed
        )
        return result

    def _fitting(self, table: RoutingTable) -> RoutingTable:
        ours = (self._exchange.rank, self._exchange.size)
        if (table.rank, table.num_ranks) != ours:
            raise ValueError(
                f"the table is for rank {table.rank} of {table.num_ranks}, "
                f"the exchange is rank {ours[0]} of {ours[1]}"
            )
        return table


class _ToExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, routed: Routed) -> Tensor:
        ctx.routed = routed
        return routed.to_experts(gather_copies(x_TD, routed), label="dispatch")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order()
        routed: Routed = ctx.routed
        back_ND = routed.to_sources(grads[0].contiguous(), label="dispatch_grad")
        return sum_copies(back_ND, routed), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_MD: Tensor, gate_TK: Tensor, routed: Routed) -> Tensor:
        y_ND = routed.to_sources(rows_MD.contiguous(), label="combine")
        ctx.save_for_backward(y_ND, gate_TK)
        ctx.routed = routed
        return combine_copies(y_ND, gate_TK, routed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order()
        y_ND, gate_TK = ctx.saved_tensors
        routed: Routed = ctx.routed
        grad_TD = grads[0].contiguous()
        back_ND, grad_gate_TK = output_gradients(grad_TD, y_ND.clone(), gate_TK, routed)
        return routed.to_experts(back_ND, label="combine_grad"), grad_gate_TK, None
