"""Routing of one micro-batch in one layer: from expert ids to sent and received rows.

Shapes: T tokens, K choices, N routed copies sent, M rows received, E experts, R ranks, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dispatcher.errors import DispatchInputError, HandleError
from dispatcher.exchange import Exchange, Pending
from dispatcher.layer.agreement import (
    WIDTH,
    described,
    input_problem,
    require_equal,
    require_one_place,
    require_sound_input,
    stamp,
)
from dispatcher.layer.compute import Group, groups_of, parts_of
from dispatcher.layer.permute import (
    expert_order,
    inverse_order,
    send_order,
    take_rows,
    transposed_index,
)
from dispatcher.splits.routing import BoolArray, IntArray, RoutingTable, expert_slots
from dispatcher.splits.split import Split, SplitRule, split_counts


@dataclass(kw_only=True, eq=False)
class Routed:
    """Handle of one dispatch: who sends which rows to whom. Valid for one forward and backward."""

    exchange: Exchange
    generation: int
    split: Split
    counts_RE: IntArray  # copies that each rank routes to each expert, equal on all ranks
    num_tokens: int
    top_k: int
    dim: int
    dtype: torch.dtype
    sent_N: Tensor  # copy (token * K + choice) in each sent row
    position_TK: Tensor  # sent row of each copy; N for a copy that was not sent
    groups: tuple[Group, ...]  # received rows by expert
    parts: tuple[Group, ...] | None  # received rows by expert and source, if the rule asks for it
    by_expert_M: Tensor | None  # index from received order to expert order; None: identical
    by_source_M: Tensor | None  # the inverse index
    spent: bool = field(default=False)

    @property
    def num_sent(self) -> int:
        return int(self.sent_N.shape[0])

    @property
    def num_received(self) -> int:
        return sum(self._splits[1])

    @cached_property
    def _splits(self) -> tuple[list[int], list[int]]:
        """Numbers of rows to each rank and from each rank."""
        return self.split.send_JE.sum(1).tolist(), self.split.recv_IE.sum(1).tolist()

    def spend(self) -> None:
        """Mark the handle as used.

        Raises:
            HandleError: The handle was used before.
        """
        if self.spent:
            raise HandleError("this dispatch was already combined", generation=self.generation)
        self.spent = True

    def check_weights(self, gate_TK: Tensor) -> None:
        """Check that the weights are floats [T, K] on the device of the tokens.

        Raises:
            DispatchInputError: The weights do not fit; nothing was sent.
        """
        shape, device = (self.num_tokens, self.top_k), self.sent_N.device
        if (
            tuple(gate_TK.shape) != shape
            or not gate_TK.is_floating_point()
            or gate_TK.device != device
        ):
            raise DispatchInputError(
                f"weights must be floats {shape} on {device} as the expert ids were, got "
                f"{described(gate_TK)}"
            )

    def check_tokens(self, x_TD: Tensor) -> None:
        """Check that the tokens have the shape, dtype and device of the routed ones.

        Raises:
            DispatchInputError: The tokens differ; nothing was sent.
        """
        shape, device = (self.num_tokens, self.dim), self.sent_N.device
        if (tuple(x_TD.shape), x_TD.dtype, x_TD.device) != (shape, self.dtype, device):
            raise DispatchInputError(
                f"tokens {shape} {self.dtype} on {device} were routed, got {described(x_TD)}"
            )

    def to_experts(self, send_ND: Tensor, *, label: str, is_ours: bool = False) -> Tensor:
        """Exchange rows from their sources to the experts; returns [M, D], grouped by expert.

        With ``is_ours`` the memory of ``send_ND`` is freed; the caller must not use it again.
        """
        rows = send_ND.new_empty(self.num_received, send_ND.shape[1])
        self._exchange_rows(rows, send_ND, label=label, forth=True)
        if is_ours:
            _give_back(send_ND)
        return take_rows(rows, self.by_expert_M)

    def to_sources(self, rows_MD: Tensor, *, label: str, is_ours: bool = False) -> Tensor:
        """Exchange rows, grouped by expert, back to their sources; returns [N, D] in sent order.

        With ``is_ours`` the memory of ``rows_MD`` is freed; the caller must not use it again.
        """
        send_MD = take_rows(rows_MD, self.by_source_M)
        if is_ours and send_MD is not rows_MD:
            _give_back(rows_MD)
        back = send_MD.new_empty(self.num_sent, send_MD.shape[1])
        self._exchange_rows(back, send_MD, label=label, forth=False)
        if is_ours or send_MD is not rows_MD:
            _give_back(send_MD)
        return back

    def _exchange_rows(self, output: Tensor, input: Tensor, *, label: str, forth: bool) -> None:
        send, recv = self._splits
        self.exchange.all_to_all(
            output,
            input,
            output_splits=recv if forth else send,
            input_splits=send if forth else recv,
            label=label,
        )


def _give_back(rows: Tensor) -> None:
    """Free the memory of rows that have been sent, even if the tensor is still referenced.

    Gloo's thread holds the tensors of a finished collective until the thread runs again.
    """
    storage = rows.untyped_storage()
    if rows.device.type == "cpu" and storage.resizable():
        storage.resize_(0)


@dataclass(kw_only=True, eq=False)
class Counting:
    """A counts exchange in progress; other work may run before ``finish_routing``."""

    exchange: Exchange
    table: RoutingTable
    rule: SplitRule
    served_ER: BoolArray | None
    x_TD: Tensor
    expert_TK: Tensor
    # [R, E + 5]: each rank's counts, then its input problem (0: none), the values that all ranks
    # must agree on, and its place in the step
    counts_RE: Tensor
    order_N: Tensor
    pending: Pending
    expert_of_slot: tuple[int, ...]


def start_routing(
    x_TD: Tensor,
    expert_TK: Tensor,
    *,
    table: RoutingTable,
    exchange: Exchange,
    rule: SplitRule | None = None,
    served_ER: BoolArray | None = None,
    expert_of_slot: Sequence[int] | None = None,
    place: int = 0,
) -> Counting:
    """Count the copies per expert and start the exchange of the counts. Collective.

    A rank with invalid input takes part as well and reports the problem beside its counts: every
    rank then raises in ``finish_routing``, and none waits for rows that never arrive. Token width,
    dtype and generation are compared in the same exchange.

    Args:
        x_TD: Tokens [T, D].
        expert_TK: Chosen experts, int64 [T, K]; -1 sends no copy.
        table: Replicas of the layer, made for this rank.
        exchange: Collectives over the ranks of ``table``.
        rule: How copies are split over replicas; None: all go to the home replica.
        served_ER: Replicas that served earlier in this step, see ``split_counts``.
        expert_of_slot: Experts in this rank's slots; None: in the table's order.
        place: Place of this rank in the step, see ``place_code``; 0 if unknown.

    Returns:
        The exchange in progress, for ``finish_routing``.
    """
    named = table.slots_of(table.rank)
    slots = named if expert_of_slot is None else tuple(expert_of_slot)
    device, num_experts = x_TD.device, table.num_experts
    problem = input_problem(x_TD, expert_TK, num_experts=num_experts, slots=slots, named=named)
    counts_RE = torch.zeros(table.num_ranks, num_experts + WIDTH, dtype=torch.int32, device=device)
    counts_RE[table.rank, -1] = place
    if problem:
        expert_N = torch.full((0,), -1, dtype=torch.int64, device=device)
        counts_RE[table.rank, num_experts] = problem
    else:
        expert_N = expert_TK.reshape(-1)
        outside_N = (expert_N < -1) | (expert_N >= num_experts)
        lane_N = torch.where(outside_N | (expert_N < 0), num_experts, expert_N)
        row_E = counts_RE[table.rank]
        row_E.scatter_add_(0, lane_N, torch.ones_like(lane_N, dtype=torch.int32))
        row_E[num_experts] = outside_N.any() * 5
        row_E[num_experts + 1 : -1] = stamp(x_TD.shape[1], x_TD.dtype, table.generation, device)
    pending = exchange.start_all_reduce(counts_RE, label="counts")
    return Counting(
        exchange=exchange, table=table, rule=rule or SplitRule(), served_ER=served_ER,
        x_TD=x_TD, expert_TK=expert_TK, counts_RE=counts_RE, pending=pending, expert_of_slot=slots,
        order_N=expert_order(expert_N, num_experts=num_experts),
    )  # fmt: skip


def finish_routing(counting: Counting, *, expert_of_slot: tuple[int, ...] | None = None) -> Routed:
    """Wait for the counts and compute the layout of the row exchanges.

    This is the only point of a dispatch where the host waits for the device.

    Args:
        counting: Result of ``start_routing``.
        expert_of_slot: Experts in this rank's slots if they have changed since ``start_routing``;
            None: unchanged.

    Returns:
        The handle for the row exchanges.

    Raises:
        DispatchInputError: This rank's input is invalid.
        PeerInputError: Another rank's input is invalid.
        RankMismatchError: The ranks' tokens differ in width or dtype, or their tables in
            generation.
        RanksPartedError: Ranks are at different places of the step.
    """
    counting.pending.wait()
    table = counting.table
    all_RE = counting.counts_RE.cpu().numpy().astype(np.int64)
    num_experts = table.num_experts
    require_one_place(all_RE[:, -1])
    require_sound_input(
        all_RE[:, num_experts], rank=table.rank, x_TD=counting.x_TD, expert_TK=counting.expert_TK,
        num_experts=num_experts, slots=counting.expert_of_slot,
    )  # fmt: skip
    require_equal(all_RE[:, num_experts + 1 : -1])
    counts_RE = all_RE[:, :num_experts]
    split = split_counts(counts_RE, table, counting.rule, served_ER=counting.served_ER)
    slot_of = expert_slots(counting.expert_of_slot if expert_of_slot is None else expert_of_slot)
    rows_E = split.recv_IE.sum(0)
    served = np.flatnonzero(rows_E)
    device = counting.order_N.device
    sent_N = send_order(counting.order_N, split.send_JE)
    num_tokens, top_k = counting.expert_TK.shape
    recv_IS = split.recv_IE[:, served]
    groups = groups_of([slot_of[int(e)] for e in served], [int(n) for n in rows_E[served]])
    return Routed(
        exchange=counting.exchange, generation=table.generation, split=split, counts_RE=counts_RE,
        num_tokens=num_tokens, top_k=top_k, dim=counting.x_TD.shape[1], dtype=counting.x_TD.dtype,
        sent_N=sent_N,
        position_TK=inverse_order(sent_N, num_copies=num_tokens * top_k).view(num_tokens, top_k),
        groups=groups,
        parts=parts_of(groups, recv_IS.T.tolist()) if counting.rule.by_source else None,
        by_expert_M=transposed_index(recv_IS, device=device),
        by_source_M=transposed_index(np.ascontiguousarray(recv_IS.T), device=device),
    )  # fmt: skip


def route(
    x_TD: Tensor,
    expert_TK: Tensor,
    *,
    table: RoutingTable,
    exchange: Exchange,
    rule: SplitRule | None = None,
    served_ER: BoolArray | None = None,
    expert_of_slot: Sequence[int] | None = None,
) -> Routed:
    """Call ``start_routing`` and ``finish_routing``; see there for arguments and errors."""
    return finish_routing(
        start_routing(
            x_TD, expert_TK, table=table, exchange=exchange, rule=rule, served_ER=served_ER,
            expert_of_slot=expert_of_slot,
        )
    )  # fmt: skip


def meet(
    table: RoutingTable, exchange: Exchange, *, place: int, device: torch.device | None = None
) -> None:
    """Compare the ranks' places in the step where no counts are exchanged. Collective.

    The collective has the same kind and size as a counts exchange: a rank that runs fewer layers
    than the others meets their counts here, and all of them raise. (Gloo aborts the process if
    ranks meet in collectives of different sizes.)

    Args:
        table: Routing table of the layer.
        exchange: Collectives over the ranks of ``table``.
        place: Place of this rank, see ``place_code``.
        device: Device of the collective's tensor.

    Raises:
        RanksPartedError: Ranks are at different places of the step.
    """
    lanes_RE = torch.zeros(
        table.num_ranks, table.num_experts + WIDTH, dtype=torch.int32, device=device
    )
    lanes_RE[table.rank, -1] = place
    exchange.all_reduce(lanes_RE, label="meeting")
    require_one_place(lanes_RE[:, -1].cpu().numpy().astype(np.int64))
