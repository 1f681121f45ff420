"""Integer splits: how many copies of each expert every rank sends to which replica.

Every rank computes the same integers from the same counts; no copy is dropped or padded. A split
has two parts. The quota of a replica is the number of rows that it serves and depends on the mode.
The senders do not: a rank first serves its own copies as far as its quota allows, and sends the
overflow to other replicas with room in their quotas.

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
    """How copies are split over replicas; must be the same on all ranks.

    Args:
        mode: "home": all copies of an expert go to its home replica, with the least gradient
            traffic. "shares": each replica serves the plan's share (the paper's Algorithm 1).
            "balanced": spread hot experts of each micro-batch where that is worth the gradient
            traffic, see ``balance.py``.
        rows_per_replica: For "balanced": number of rows that take as long as sending one expert's
            gradient. Raise this value on slow networks; 0 ignores gradient traffic.
        ranks_per_device: For "balanced": average number of ranks that share a device or core.
        by_source: For "home": compute an expert's weight gradient for the rows of each source rank
            by itself, and add these in rank order, so that the sum does not depend on which rows
            came together. Costs a pass over the gradient for each source.

    Raises:
        ValueError: Unknown mode, negative ``rows_per_replica``, ``ranks_per_device`` < 1, or
            ``by_source`` with another mode than "home".
    """

    mode: str = "home"
    rows_per_replica: float = 0.0
    ranks_per_device: float = 1.0
    by_source: bool = False

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"unknown split mode {self.mode!r}; known: {', '.join(MODES)}")
        if self.rows_per_replica < 0:
            raise ValueError(f"rows_per_replica={self.rows_per_replica} must be >= 0")
        if not self.ranks_per_device >= 1:
            raise ValueError(f"ranks_per_device={self.ranks_per_device} must be >= 1")
        if self.by_source and self.mode != "home":
            raise ValueError(f"by_source needs the mode 'home', got {self.mode!r}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """Row counts of one micro-batch: sent and received by this rank, served by each replica."""

    send_JE: IntArray  # copies of each expert that this rank sends to each rank
    recv_IE: IntArray  # copies of each expert that this rank receives from each rank
    rows_ER: IntArray  # copies of each expert that each rank serves, equal on all ranks

    @property
    def served_ER(self) -> BoolArray:
        """Replicas that serve at least one row, bool [E, R]."""
        return self.rows_ER > 0


def split_counts(
    counts_IE: IntArray,
    table: RoutingTable,
    rule: SplitRule,
    *,
    served_ER: BoolArray | None = None,
) -> Split:
    """Compute the split of one layer and one micro-batch.

    Args:
        counts_IE: Copies that each rank routes to each expert, [R, E].
        table: Replicas of the layer.
        rule: How copies are split over replicas.
        served_ER: For "balanced": replicas that served earlier in this step, bool [E, R]; using
            them again adds no gradient traffic.
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
    """Return the split in which all copies of an expert go to its home replica."""
    quota_EJ = np.zeros(table.holds_ER.shape, dtype=np.int64)
    quota_EJ[np.arange(table.num_experts), table.home_E] = counts_IE.sum(0)
    at_home_JE = table.at_home_RE
    return Split(
        send_JE=counts_IE[table.rank][None, :] * at_home_JE,
        recv_IE=counts_IE * at_home_JE[table.rank][None, :],
        rows_ER=quota_EJ,
    )


def rounded_shares(total_E: IntArray, shares_EJ: FloatArray) -> IntArray:
    """Round ``total * share`` to integer quotas that sum to the totals; ties: lower rank."""
    exact_EJ = total_E[:, None] * shares_EJ
    quota_EJ = np.floor(exact_EJ).astype(np.int64)
    # A rank without the expert must never get a row, even if rounding leaves a remainder.
    remainder_EJ = np.where(shares_EJ > 0, exact_EJ - quota_EJ, -1.0)
    return quota_EJ + _ones_for_largest(remainder_EJ, total_E - quota_EJ.sum(1))


def flows(counts_IE: IntArray, quota_EJ: IntArray) -> IntArray:
    """Return the copies from each rank to each replica, int64 [I, E, J].

    Local copies come first. Then the sources, in rank order, distribute their overflow in
    proportion to the room left in the quotas, rounded by largest remainder (ties: lower rank).
    Sums over targets equal the counts, and sums over sources equal the quotas, exactly.

    Source: Algorithm 1 of the Lazarus paper, with the sum over all residual capacities as its
    denominator; the paper does not specify the rounding.
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
    """Return one rank's split: local copies first, then the overflow by overlapping intervals.

    Per expert, lay the overflow of all sources on a line in rank order, and the room of all targets
    likewise; a source sends to a target the length of their overlap. Counts and quotas are met
    exactly, messages are fewer and larger than in ``flows``, and each rank computes only its part.
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
    """Overlap of each rank's interval with one given interval per expert, [R, E]."""
    begin_RE = np.maximum(end_RE - size_RE, end_E - size_E)
    common_RE: IntArray = np.maximum(np.minimum(end_RE, end_E) - begin_RE, 0)
    return common_RE


def _shared_out(overflow_E: IntArray, room_EJ: IntArray) -> IntArray:
    """Distribute ``overflow_E`` in proportion to ``room_EJ``, in integers that never exceed it."""
    room_E = np.maximum(room_EJ.sum(1), 1)
    scaled_EJ = overflow_E[:, None] * room_EJ
    out_EJ: IntArray = scaled_EJ // room_E[:, None]
    remainder_EJ = np.where(room_EJ > out_EJ, scaled_EJ % room_E[:, None], -1)
    return out_EJ + _ones_for_largest(remainder_EJ, overflow_E - out_EJ.sum(1))


def _ones_for_largest(key_EJ: IntArray | FloatArray, count_E: IntArray) -> IntArray:
    """Return a mask of the ``count`` largest keys of each row, as int64; ties: lower column."""
    order_EJ = np.argsort(-key_EJ, axis=1, kind="stable")
    ones_EJ = np.zeros(key_EJ.shape, dtype=np.int64)
    first_EJ = np.arange(key_EJ.shape[1])[None, :] < count_E[:, None]
    np.put_along_axis(ones_EJ, order_EJ, first_EJ.astype(np.int64), axis=1)
    return ones_EJ
