"""Integer splits: how many copies of each expert every rank sends to which replica.

Every rank computes the same integers from the same counts; nothing is dropped or padded. A split
is made in two parts: how many rows each replica serves (its quota), which depends on the mode, and
who sends them, which does not: a rank keeps what it can serve itself, and its overflow goes to the
other replicas as far as their quotas have room.

Shapes: I source ranks, J target ranks (both R), E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dispatcher.splits.balance import balanced_quotas
from dispatcher.splits.routing import BoolArray, FloatArray, IntArray, RoutingTable

MODES = ("home", "shares", "balanced")


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitRule:
    """How copies are split over replicas; the same on all ranks.

    Args:
        mode: "home": all copies of an expert go to one replica. "shares": each replica serves its
            share, the paper's Algorithm 1. "balanced": spread where that pays, see ``balance.py``.
        rows_per_replica: "balanced" only: how many rows take as long as sending one expert's
            gradient; 0 spreads at no regard for traffic.
        ranks_per_device: "balanced" only: how many ranks share one device, or one core, on average.

    Raises:
        ValueError: No such mode, a negative cost, or less than one rank per device.
    """

    mode: str = "home"
    rows_per_replica: float = 0.0
    ranks_per_device: float = 1.0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"unknown split mode {self.mode!r}; known: {', '.join(MODES)}")
        if self.rows_per_replica < 0:
            raise ValueError(f"rows_per_replica={self.rows_per_replica} must be >= 0")
        if not self.ranks_per_device >= 1:
            raise ValueError(f"ranks_per_device={self.ranks_per_device} must be >= 1")


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """What one rank sends and receives, and what every replica serves."""

    send_JE: IntArray  # copies of each expert that this rank sends to each rank
    recv_IE: IntArray  # copies of each expert that this rank receives from each rank
    rows_ER: IntArray  # copies of each expert that each rank serves, equal on all ranks

    @property
    def served_ER(self) -> BoolArray:
        """Which replicas serve anything."""
        return self.rows_ER > 0


def split_counts(
    counts_IE: IntArray,
    table: RoutingTable,
    rule: SplitRule,
    *,
    served_ER: BoolArray | None = None,
) -> Split:
    """One layer's split of one micro-batch.

    Args:
        counts_IE: Copies that each rank routes to each expert, [R, E].
        table: Replicas of the layer.
        rule: How to split.
        served_ER: "balanced" only: replicas that served earlier in this step and cost no more.
    """
    total_E = counts_IE.sum(0)
    if rule.mode == "home":
        return home_split(counts_IE, table)
    if rule.mode == "shares":
        quota_EJ = rounded_shares(total_E, table.shares_ER)
    else:
        quota_EJ = balanced_quotas(
            total_E, table, rows_per_replica=rule.rows_per_replica,
            ranks_per_device=rule.ranks_per_device, served_ER=served_ER,
        )  # fmt: skip
        return lined_up(counts_IE, quota_EJ, rank=table.rank)
    flow_IEJ = flows(counts_IE, quota_EJ)
    return Split(
        send_JE=np.ascontiguousarray(flow_IEJ[table.rank].T),
        recv_IE=np.ascontiguousarray(flow_IEJ[:, :, table.rank]),
        rows_ER=quota_EJ,
    )


def home_split(counts_IE: IntArray, table: RoutingTable) -> Split:
    """All copies of an expert go to its home replica."""
    quota_EJ = np.zeros(table.holds_ER.shape, dtype=np.int64)
    quota_EJ[np.arange(table.num_experts), table.home_E] = counts_IE.sum(0)
    at_home_JE = table.at_home_RE
    return Split(
        send_JE=counts_IE[table.rank][None, :] * at_home_JE,
        recv_IE=counts_IE * at_home_JE[table.rank][None, :],
        rows_ER=quota_EJ,
    )


def rounded_shares(total_E: IntArray, shares_EJ: FloatArray) -> IntArray:
    """Whole quotas next to ``total * share``, summing to the totals; ties to the lower rank."""
    exact_EJ = total_E[:, None] * shares_EJ
    quota_EJ = np.floor(exact_EJ).astype(np.int64)
    # Rounding in the product may leave a remainder on a rank without the expert: never there.
    remainder_EJ = np.where(shares_EJ > 0, exact_EJ - quota_EJ, -1.0)
    return quota_EJ + _ones_for_largest(remainder_EJ, total_E - quota_EJ.sum(1))


def flows(counts_IE: IntArray, quota_EJ: IntArray) -> IntArray:
    """Copies from each rank to each replica, [I, E, J]: local ones first, then the overflow.

    Row sums are the counts and column sums the quotas, both exactly: sources take their turns in
    rank order and share out the room that is left by largest remainder, ties to the lower rank.

    Source: Algorithm 1 of the Lazarus paper, with the sum over all residual capacities as its
    denominator; the rounding is ours.
    """
    num_ranks = counts_IE.shape[0]
    flow_IEJ = np.zeros((num_ranks, *quota_EJ.shape), dtype=np.int64)
    local_IE = np.minimum(counts_IE, quota_EJ.T)
    room_EJ = quota_EJ - local_IE.T
    for rank in range(num_ranks):
        overflow_E = counts_IE[rank] - local_IE[rank]
        if overflow_E.any():
            out_EJ = _shared_out(overflow_E, room_EJ)
            room_EJ -= out_EJ
            flow_IEJ[rank] = out_EJ
        flow_IEJ[rank, :, rank] += local_IE[rank]
    return flow_IEJ


def lined_up(counts_IE: IntArray, quota_EJ: IntArray, *, rank: int) -> Split:
    """The split of one rank: local copies first, the overflow dealt out along a line.

    Per expert, the overflow of all sources lies on a line in rank order, and so does the room of
    all targets; who overlaps sends to whom. Both sums come out exactly, with fewer and larger
    messages than in proportion, and a rank computes its own part alone.
    """
    local_IE = np.minimum(counts_IE, quota_EJ.T)
    over_IE, room_JE = counts_IE - local_IE, quota_EJ.T - local_IE
    over_end_IE, room_end_JE = over_IE.cumsum(0), room_JE.cumsum(0)
    send_JE = _overlap(room_end_JE, room_JE, over_end_IE[rank], over_IE[rank])
    recv_IE = _overlap(over_end_IE, over_IE, room_end_JE[rank], room_JE[rank])
    send_JE[rank] += local_IE[rank]
    recv_IE[rank] += local_IE[rank]
    return Split(send_JE=send_JE, recv_IE=recv_IE, rows_ER=quota_EJ)


def _overlap(end_RE: IntArray, size_RE: IntArray, end_E: IntArray, size_E: IntArray) -> IntArray:
    """Common length of each rank's interval with one rank's, per expert."""
    begin_RE = np.maximum(end_RE - size_RE, end_E - size_E)
    common_RE: IntArray = np.maximum(np.minimum(end_RE, end_E) - begin_RE, 0)
    return common_RE


def _shared_out(overflow_E: IntArray, room_EJ: IntArray) -> IntArray:
    """``overflow`` in proportion to ``room``, in integers; never more than the room."""
    room_E = np.maximum(room_EJ.sum(1), 1)
    scaled_EJ = overflow_E[:, None] * room_EJ
    out_EJ: IntArray = scaled_EJ // room_E[:, None]
    remainder_EJ = np.where(room_EJ > out_EJ, scaled_EJ % room_E[:, None], -1)
    return out_EJ + _ones_for_largest(remainder_EJ, overflow_E - out_EJ.sum(1))


def _ones_for_largest(key_EJ: IntArray | FloatArray, count_E: IntArray) -> IntArray:
    """A one at the ``count`` largest keys of each row, ties to the lower column."""
    order_EJ = np.argsort(-key_EJ, axis=1, kind="stable")
    ones_EJ = np.zeros(key_EJ.shape, dtype=np.int64)
    first_EJ = np.arange(key_EJ.shape[1])[None, :] < count_E[:, None]
    np.put_along_axis(ones_EJ, order_EJ, first_EJ.astype(np.int64), axis=1)
    return ones_EJ
