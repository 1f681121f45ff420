"""The dispatcher alone: any expert function between ``dispatch`` and ``combine``, by autograd.

``MoELayer`` takes the faster ``expert_path``; this face is for experts of the caller's own.

Shapes: T tokens, K choices, N copies sent, M rows received, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dispatcher.errors import HandleError
from dispatcher.exchange import Exchange
from dispatcher.layer.compute import Group
from dispatcher.layer.dispatch import Routed, route
from dispatcher.layer.path import combine_copies, gather_copies, output_gradients, sum_copies
from dispatcher.splits.routing import RoutingTable
from dispatcher.splits.split import SplitRule


@dataclass(frozen=True, kw_only=True, eq=False)
class Dispatched:
    """Rows that arrived at this rank, grouped by expert. Serves one ``combine``."""

    rows_MD: Tensor
    routed: Routed

    @property
    def generation(self) -> int:
        """Generation of the routing table that these rows were dispatched by."""
        return self.routed.generation

    @property
    def groups(self) -> tuple[Group, ...]:
        """Slot and row range of each expert that received rows, in the order of expert ids."""
        return self.routed.groups

    def with_rows(self, rows_MD: Tensor) -> Dispatched:
        """The same dispatch with the experts' output in place of their input.

        Raises:
            ValueError: Another number of rows.
        """
        if rows_MD.shape[0] != self.rows_MD.shape[0]:
            raise ValueError(f"{rows_MD.shape[0]} rows for a dispatch of {self.rows_MD.shape[0]}")
        return replace(self, rows_MD=rows_MD)

    def map(self, expert: Callable[[int, Tensor], Tensor]) -> Dispatched:
        """Each group through ``expert(slot, rows)``, which keeps the number of rows."""
        if not self.groups:
            return self
        parts = [expert(g.slot, self.rows_MD[g.begin : g.end]) for g in self.groups]
        return self.with_rows(torch.cat(parts))


class Dispatcher:
    """Sends tokens to the ranks that hold their experts and brings the results back.

    Every rank must call ``dispatch`` and ``combine`` in the same order, also with no tokens, and
    must run the backward if any rank does.

    Args:
        table: Replicas of the layer, for this rank.
        exchange: The ranks of the table.
        rule: How copies are split over replicas; None: all to the home replica.
        expert_of_slot: Experts in this rank's slots, if not in the table's order (see
            ``slots_for_exchange``); ``sum_replica_gradients`` must be given the same.

    Raises:
        ValueError: Table and exchange are of different worlds.
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
        """Experts in this rank's slots, -1 for an empty one."""
        return self._expert_of_slot

    def update(self, table: RoutingTable, *, expert_of_slot: Sequence[int] | None = None) -> None:
        """Dispatch by another table from now on; handles of another generation are refused.

        Without ``expert_of_slot`` the slots are in the table's order.
        """
        self._table = self._fitting(table)
        slots = table.slots_of(table.rank) if expert_of_slot is None else expert_of_slot
        self._expert_of_slot = tuple(slots)

    def dispatch(self, x_TD: Tensor, expert_TK: Tensor) -> Dispatched:
        """Tokens to their experts.

        Args:
            x_TD: Tokens, contiguous; they must require a gradient on all ranks or on none.
            expert_TK: Chosen experts, int64, contiguous; -1 = this copy goes nowhere.

        Raises:
            DispatchInputError: Wrong dtype, shape, layout, device, ids or slots on this rank.
            PeerInputError: On another rank; nothing was dispatched.
            RankMismatchError: The ranks' tokens differ in width or dtype, or their tables in
                generation; nothing was dispatched.
        """
        routed = route(
            x_TD, expert_TK, table=self._table, exchange=self._exchange, rule=self._rule,
            expert_of_slot=self._expert_of_slot,
        )  # fmt: skip
        rows_MD: Tensor = _ToExperts.apply(x_TD, routed)  # type: ignore[no-untyped-call]
        return Dispatched(rows_MD=rows_MD, routed=routed)

    def combine(self, dispatched: Dispatched, weight_TK: Tensor) -> Tensor:
        """Weighted sum of each token's expert outputs, [T, D], in the outputs' dtype.

        Raises:
            DispatchInputError: The weights are no floats of the choices' shape and device.
            HandleError: The handle was combined before, or is of another generation.
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
        routed: Routed = ctx.routed
        back_ND = routed.to_sources(grads[0].contiguous(), label="dispatch_grad")
        return sum_copies(back_ND, routed), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_MD: Tensor, weight_TK: Tensor, routed: Routed) -> Tensor:
        y_ND = routed.to_sources(rows_MD.contiguous(), label="combine")
        ctx.save_for_backward(y_ND, weight_TK)
        ctx.routed = routed
        return combine_copies(y_ND, weight_TK, routed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        y_ND, weight_TK = ctx.saved_tensors
        routed: Routed = ctx.routed
        grad_TD = grads[0].contiguous()
        back_ND, weight_grad_TK = output_gradients(grad_TD, y_ND.clone(), weight_TK, routed)
        return routed.to_experts(back_ND, label="combine_grad"), weight_grad_TK, None
