"""Routing of one micro-batch in one layer: from expert ids to sent and received rows.

Shapes: T tokens, K choices, N routed copies sent, M rows received, E experts, R ranks, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from dispatcher.errors import (
    DispatchInputError,
    HandleError,
    PeerInputError,
    RankMismatchError,
    RanksPartedError,
)
from dispatcher.exchange import Exchange, Pending
from dispatcher.layer.compute import Group, groups_of
from dispatcher.layer.permute import (
    expert_order,
    inverse_order,
    send_order,
    take_rows,
    transposed_index,
)
from dispatcher.layer.places import place_text
from dispatcher.splits.routing import BoolArray, IntArray, RoutingTable, expert_slots
from dispatcher.splits.split import Split, SplitRule, split_counts

_REASONS = {
    1: "tokens or expert ids have the wrong dtype",
    2: "shapes of tokens and expert ids do not fit",
    3: "top-k exceeds the number of experts",
    4: "tokens or expert ids are not contiguous",
    5: "an expert id is out of range",
    6: "there is no choice per token (top-k is 0)",
    7: "tokens and expert ids are on different devices",
    8: "the slots hold an expert twice, or not all that the table says",
}
_TOKEN_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MUST_AGREE = ("width", "element type", "generation")
_WIDTH = 1 + len(_MUST_AGREE) + 1  # after the counts: problem, _MUST_AGREE, place


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

    def check_weights(self, weight_TK: Tensor) -> None:
        """Check that the weights are floats [T, K] on the device of the tokens.

        Raises:
            DispatchInputError: The weights do not fit; nothing was sent.
        """
        shape, device = (self.num_tokens, self.top_k), self.sent_N.device
        if (
            tuple(weight_TK.shape) != shape
            or not weight_TK.is_floating_point()
            or weight_TK.device != device
        ):
            raise DispatchInputError(
                f"weights must be floats {shape} on {device} as the expert ids were, got "
                f"{_what(weight_TK)}"
            )

    def check_tokens(self, x_TD: Tensor) -> None:
        """Check that the tokens have the shape, dtype and device of the routed ones.

        Raises:
            DispatchInputError: The tokens differ; nothing was sent.
        """
        shape, device = (self.num_tokens, self.dim), self.sent_N.device
        if (tuple(x_TD.shape), x_TD.dtype, x_TD.device) != (shape, self.dtype, device):
            raise DispatchInputError(
                f"tokens {shape} {self.dtype} on {device} were routed, got {_what(x_TD)}"
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
        x_TD: Tokens [T, D], contiguous.
        expert_TK: Chosen experts, int64 [T, K], contiguous; -1 sends no copy.
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
    problem = _input_problem(x_TD, expert_TK, num_experts=table.num_experts)
    if not problem and slots is not named and not _holds_all(slots, named):
        problem = 8
    device, num_experts = x_TD.device, table.num_experts
    counts_RE = torch.zeros(table.num_ranks, num_experts + _WIDTH, dtype=torch.int32, device=device)
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
        row_E[num_experts + 1 : -1] = _stamp(
            x_TD.shape[1], _TOKEN_DTYPES.index(x_TD.dtype), table.generation, device
        )
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
    _require_one_place(all_RE[:, -1])
    _raise_refusals(all_RE[:, num_experts], rank=table.rank, counting=counting)
    _raise_mismatch(all_RE[:, num_experts + 1 : -1])
    counts_RE = all_RE[:, :num_experts]
    split = split_counts(counts_RE, table, counting.rule, served_ER=counting.served_ER)
    slot_of = expert_slots(counting.expert_of_slot if expert_of_slot is None else expert_of_slot)
    rows_E = split.recv_IE.sum(0)
    served = np.flatnonzero(rows_E)
    device = counting.order_N.device
    sent_N = send_order(counting.order_N, split.send_JE)
    num_tokens, top_k = counting.expert_TK.shape
    recv_IS = split.recv_IE[:, served]
    return Routed(
        exchange=counting.exchange, generation=table.generation, split=split, counts_RE=counts_RE,
        num_tokens=num_tokens, top_k=top_k, dim=counting.x_TD.shape[1], dtype=counting.x_TD.dtype,
        sent_N=sent_N,
        position_TK=inverse_order(sent_N, num_copies=num_tokens * top_k).view(num_tokens, top_k),
        groups=groups_of([slot_of[int(e)] for e in served], [int(n) for n in rows_E[served]]),
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


def _input_problem(x_TD: Tensor, expert_TK: Tensor, *, num_experts: int) -> int:
    """Return 0 or a key of ``_REASONS``. Reads no tensor content."""
    if x_TD.dtype not in _TOKEN_DTYPES or expert_TK.dtype != torch.int64:
        return 1
    if x_TD.dim() != 2 or expert_TK.dim() != 2 or x_TD.shape[0] != expert_TK.shape[0]:
        return 2
    if expert_TK.shape[1] == 0:
        return 6
    if expert_TK.shape[1] > num_experts:
        return 3
    if x_TD.device != expert_TK.device:
        return 7
    if not (x_TD.is_contiguous() and expert_TK.is_contiguous()):
        return 4
    return 0


def _holds_all(slots: Sequence[int], named: Sequence[int]) -> bool:
    """Whether the slots hold every expert of ``named``, and no expert twice."""
    held = [expert for expert in slots if expert >= 0]
    return len(held) == len(set(held)) and {e for e in named if e >= 0} <= set(held)


@lru_cache(maxsize=64)
def _stamp(dim: int, dtype: int, generation: int, device: torch.device) -> Tensor:
    """The values of ``_MUST_AGREE`` as a tensor; cached, because they rarely change."""
    return torch.tensor([dim, dtype, generation % 2**31], dtype=torch.int32, device=device)


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
        table.num_ranks, table.num_experts + _WIDTH, dtype=torch.int32, device=device
    )
    lanes_RE[table.rank, -1] = place
    exchange.all_reduce(lanes_RE, label="meeting")
    _require_one_place(lanes_RE[:, -1].cpu().numpy().astype(np.int64))


def _require_one_place(code_R: IntArray) -> None:
    if (code_R != code_R[0]).any():
        raise RanksPartedError([place_text(code) for code in code_R.tolist()])


def _raise_mismatch(stamp_RA: IntArray) -> None:
    for what, values_R in zip(_MUST_AGREE, stamp_RA.T.tolist(), strict=True):
        if len(set(values_R)) > 1:
            is_dtype = what == "element type"
            raise RankMismatchError(
                what=what,
                values=[str(_TOKEN_DTYPES[v]) if is_dtype else str(v) for v in values_R],
            )


def _raise_refusals(flags_R: IntArray, *, rank: int, counting: Counting) -> None:
    if flags_R[rank]:
        reason = _REASONS[int(flags_R[rank])]
        expert_TK = counting.expert_TK
        raise DispatchInputError(
            f"{reason}: tokens {_what(counting.x_TD)}, expert ids {_what(expert_TK)}, "
            f"{counting.table.num_experts} experts"
            + (f", ids {_id_range(expert_TK)}" if flags_R[rank] == 5 else "")
            + (f", slots {counting.expert_of_slot}" if flags_R[rank] == 8 else "")
        )
    refused = np.flatnonzero(flags_R)
    if refused.size:
        raise PeerInputError(rank=int(refused[0]), reason=_REASONS[int(flags_R[refused[0]])])


def _what(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"


def _id_range(expert_TK: Tensor) -> str:
    return f"{int(expert_TK.min())}..{int(expert_TK.max())}"
