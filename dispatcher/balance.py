"""How many rows each replica is to serve, so that the busiest rank has little and few replicas
serve at all.

With one device per rank the busiest rank sets the pace; but replicas that serve must have their
gradients summed. Both are counted in rows, for the rank that has most of each:
``busiest rank's rows + rows_per_replica * busiest sender's gradients``, where a sender's gradients
are counted in experts: of an expert with h replicas, v of them serving, each server sends
``(v - 1 + h - 1) / v`` (its slices to their owners, its own slice to all holders).

Everything is arithmetic in a fixed order on equal input, so every rank finds the same quotas.

Shapes: E experts, R ranks.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from dispatcher.routing import BoolArray, FloatArray, IntArray, RoutingTable

TOLERANCE = 0.01  # stop within this of the mean load: no plan can do better than the mean


def balanced_quotas(
    total_E: IntArray,
    table: RoutingTable,
    *,
    rows_per_replica: float = 0.0,
    served_ER: BoolArray | None = None,
) -> IntArray:
    """Rows that each replica serves, [E, R].

    Args:
        total_E: Copies routed to each expert by all ranks.
        table: Replicas and homes.
        rows_per_replica: Rows that take as long as sending one expert's gradient. 0: the busiest
            rank's optimum over all replicas, at no regard for traffic.
        served_ER: Replicas that have served in this step already: their gradients travel anyway.
    """
    if rows_per_replica <= 0:
        return levelled_quotas(total_E, table, open_ER=table.holds_ER)
    before_ER = np.zeros_like(table.holds_ER) if served_ER is None else served_ER & table.holds_ER
    home_ER = before_ER.copy()
    home_ER[np.arange(table.num_experts), table.home_E] = True
    hottest = np.argsort(-total_E, kind="stable")
    best: IntArray | None = None
    best_cost = np.inf
    for count in _prefixes(int((total_E > 0).sum())):
        open_ER = home_ER.copy()
        open_ER[hottest[:count]] = table.holds_ER[hottest[:count]]
        quota_ER = levelled_quotas(total_E, table, open_ER=open_ER)
        cost = split_cost(quota_ER, table, rows_per_replica=rows_per_replica, served_ER=before_ER)
        if cost < best_cost:
            best, best_cost = quota_ER, cost
    assert best is not None
    return best


def split_cost(
    quota_ER: IntArray,
    table: RoutingTable,
    *,
    rows_per_replica: float,
    served_ER: BoolArray | None = None,
) -> float:
    """What these quotas cost in rows: the busiest rank's, and the busiest sender's gradients."""
    serving_ER = quota_ER > 0
    if served_ER is not None:
        serving_ER = serving_ER | served_ER
    gradients = float(gradients_sent(serving_ER, table).max(initial=0.0))
    return float(quota_ER.sum(0).max(initial=0)) + rows_per_replica * gradients


def gradients_sent(served_ER: BoolArray, table: RoutingTable) -> FloatArray:
    """Gradients that each rank sends when these replicas served, in experts, [R]."""
    servers_E = served_ER.sum(1)
    each_E = (servers_E - 1 + table.holds_ER.sum(1) - 1) / np.maximum(servers_E, 1)
    sent_R: FloatArray = (served_ER * each_E[:, None]).sum(0)
    return sent_R


def levelled_quotas(total_E: IntArray, table: RoutingTable, *, open_ER: BoolArray) -> IntArray:
    """Rows per replica that make the busiest rank's least, with only the open replicas serving."""
    loads = _Loads([int(n) for n in total_E], open_ER)
    loads.level()
    return loads.quotas()


def _prefixes(limit: int) -> list[int]:
    """How many of the hottest experts to try spreading: 0, 1, 2, 4, 8, ..., all."""
    counts, step = [0], 1
    while step < limit:
        counts.append(step)
        step *= 2
    return [n for n in counts if n < limit] + [limit]


class _Loads:
    """Rows of each expert on each rank, levelled by moving rows along chains of replicas."""

    def __init__(self, totals: list[int], open_ER: BoolArray) -> None:
        num_experts, num_ranks = open_ER.shape
        self._shape = (num_experts, num_ranks)
        self._open: list[list[int]] = [[] for _ in range(num_experts)]
        self._spread_at: list[list[int]] = [[] for _ in range(num_ranks)]
        for expert, rank in zip(*open_ER.nonzero(), strict=True):
            self._open[int(expert)].append(int(rank))
        for expert, ranks in enumerate(self._open):
            if len(ranks) > 1:
                for rank in ranks:
                    self._spread_at[rank].append(expert)
        self._rows = [dict.fromkeys(ranks, 0) for ranks in self._open]
        self._load = [0] * num_ranks
        self._floor = -(-sum(totals) // num_ranks)  # no assignment beats the mean
        # Experts with the fewest choices go first, each to its least loaded replicas.
        order = sorted(range(num_experts), key=lambda e: (len(self._open[e]), -totals[e], e))
        for expert in order:
            self._pour(expert, totals[expert])

    def quotas(self) -> IntArray:
        quota_ER = np.zeros(self._shape, dtype=np.int64)
        for expert, rows in enumerate(self._rows):
            quota_ER[expert, list(rows)] = list(rows.values())
        return quota_ER

    def level(self) -> None:
        """Move rows off the busiest rank until none can be moved to a rank with less.

        Source: augmenting paths; with every replica open the result is the optimum of the linear
        program, rounded up, or within ``TOLERANCE`` of the mean load.
        """
        good_enough = int(self._floor * (1 + TOLERANCE))
        while (most := max(self._load)) > good_enough:
            path = self._path(self._load.index(most))
            if path is None:
                return
            self._move(path)

    def _pour(self, expert: int, left: int) -> None:
        """Fill the expert's replicas to a common level, as far as its rows go."""
        ranks = sorted(self._open[expert], key=lambda r: (self._load[r], r))
        rows, load = self._rows[expert], self._load
        if len(ranks) == 1:
            rows[ranks[0]] += left
            load[ranks[0]] += left
            return
        total, count = left, 0  # the first ``count`` ranks and the rows share one level
        for rank in ranks:
            if count and load[rank] * count >= total:
                break
            total += load[rank]
            count += 1
        level, extra = divmod(total, count)
        for i, rank in enumerate(ranks[:count]):
            rows[rank] = level + (i < extra) - load[rank]
            load[rank] += rows[rank]

    def _path(self, busy: int) -> list[tuple[int, int, int]] | None:
        """Moves (from, expert, to) that end at the least loaded reachable rank, last one first."""
        came: dict[int, tuple[int, int]] = {busy: (busy, -1)}
        queue = deque([busy])
        end = busy
        while queue:
            rank = queue.popleft()
            for expert in self._spread_at[rank]:
                if self._rows[expert][rank] > 0:
                    for other in self._open[expert]:
                        if other not in came:
                            came[other] = (rank, expert)
                            queue.append(other)
                            if (self._load[other], other) < (self._load[end], end):
                                end = other
        if self._load[end] > self._load[busy] - 2:
            return None
        path, rank = [], end
        while rank != busy:
            before, expert = came[rank]
            path.append((before, expert, rank))
            rank = before
        return path

    def _move(self, path: list[tuple[int, int, int]]) -> None:
        busy, end = path[-1][0], path[0][2]
        count = (self._load[busy] - self._load[end]) // 2
        count = min(count, *(self._rows[e][u] for u, e, _ in path))
        for u, expert, v in path:
            self._rows[expert][u] -= count
            self._rows[expert][v] += count
        self._load[busy] -= count
        self._load[end] += count
