"""Balanced quotas: rows per replica that keep the busiest rank short and few replicas serving.

With one device per rank the busiest rank sets the pace, but every further serving replica adds
gradient traffic. The cost, in rows, is
``busiest rank's rows + rows_per_replica * busiest sender's gradients``. Gradients are counted in
experts: of an expert with h replicas, v of which serve, each server sends ``(v - 1 + h - 1) / v``
(its slices to their owners, then its own summed slice to all holders). If ranks share devices or
the cores of a node, ``pace`` replaces the maximum in both terms, so that work on idle ranks is not
free either.

The arithmetic runs in a fixed order on equal input, so every rank computes the same quotas.

Shapes: E experts, R ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from dispatcher.splits.routing import BoolArray, IntArray, RoutingTable

TOLERANCE = 0.01  # stop when the busiest rank is within 1 % of the mean load


def balanced_quotas(
    total_E: IntArray,
    table: RoutingTable,
    *,
    rows_per_replica: float = 0.0,
    ranks_per_device: float = 1.0,
    served_ER: BoolArray | None = None,
) -> IntArray:
    """Return the rows that each replica serves, int64 [E, R]: the cheapest of a few candidates.

    Candidates spread the 0, 1, 2, 4, ... hottest experts over all of their replicas.

    Args:
        total_E: Copies routed to each expert by all ranks, [E].
        table: Replicas and homes.
        rows_per_replica: Number of rows that take as long as sending one expert's gradient. 0:
            spread all experts and ignore gradient traffic.
        ranks_per_device: Average number of ranks that share one device.
        served_ER: Replicas that already served in this step; their gradients are sent anyway.
    """
    if rows_per_replica <= 0:
        return levelled_quotas(total_E, table, open_ER=table.holds_ER)
    held = [table.ranks_of(expert) for expert in range(table.num_experts)]
    before: list[tuple[int, ...]] = [()] * table.num_experts
    if served_ER is not None:
        rows = served_ER.tolist()
        before = [tuple([r for r in held[e] if rows[e][r]]) for e in range(table.num_experts)]
    home = table.home_E.tolist()
    kept = [sorted({*before[e], home[e]}) for e in range(len(home))]
    hottest = np.argsort(-total_E, kind="stable").tolist()
    totals = total_E.tolist()
    best: _Loads | None = None
    best_cost = np.inf
    for count in _prefixes(sum(n > 0 for n in totals)):
        spread = set(hottest[:count])
        loads = _Loads(
            totals, [held[e] if e in spread else kept[e] for e in range(len(kept))],
            num_ranks=table.num_ranks,
        )  # fmt: skip
        loads.level()
        sent = loads.gradients_sent(held=held, before=before)
        cost = loads.pace(ranks_per_device) + rows_per_replica * pace(sent, ranks_per_device)
        if cost < best_cost:
            best, best_cost = loads, cost
    assert best is not None
    return best.quotas()


def pace(work_R: Sequence[float], ranks_per_device: float = 1.0) -> float:
    """Return when the last rank is done if all start together, in units of work.

    With one device per rank this is the maximum. Otherwise the ranks that still have work share
    all devices evenly, and no rank is faster than one device.
    """
    if ranks_per_device <= 1:
        return max(work_R, default=0.0)
    devices = len(work_R) / ranks_per_device
    done, last = 0.0, 0.0
    for finished, work in enumerate(sorted(work_R)):
        done += (work - last) * max(1.0, (len(work_R) - finished) / devices)
        last = work
    return done


def levelled_quotas(total_E: IntArray, table: RoutingTable, *, open_ER: BoolArray) -> IntArray:
    """Return quotas, [E, R], that minimize the busiest rank's rows; only open replicas serve."""
    opened = [[r for r, is_open in enumerate(row) if is_open] for row in open_ER.tolist()]
    loads = _Loads(total_E.tolist(), opened, num_ranks=table.num_ranks)
    loads.level()
    return loads.quotas()


def _prefixes(limit: int) -> list[int]:
    """Numbers of hottest experts to try to spread: 0, 1, 2, 4, 8, ..., ``limit``."""
    counts, step = [0], 1
    while step < limit:
        counts.append(step)
        step *= 2
    return [n for n in counts if n < limit] + [limit]


class _Loads:
    """An assignment of rows to replicas that ``level`` improves by moving rows along chains."""

    def __init__(
        self, totals: list[int], opened: Sequence[Sequence[int]], *, num_ranks: int
    ) -> None:
        self._open = opened
        self._spread_at: list[list[int]] = [[] for _ in range(num_ranks)]
        self._rows: list[dict[int, int]] = []
        self._load = [0] * num_ranks
        self._floor = -(-sum(totals) // num_ranks)  # no assignment beats the mean
        spread = []
        for expert, ranks in enumerate(opened):
            if len(ranks) > 1:
                spread.append(expert)
                self._rows.append(dict.fromkeys(ranks, 0))
                for rank in ranks:
                    self._spread_at[rank].append(expert)
            else:
                self._rows.append({ranks[0]: totals[expert]})
                self._load[ranks[0]] += totals[expert]
        # Experts with the fewest choices go first, each to its least loaded replicas.
        spread.sort(key=lambda e: (len(opened[e]), -totals[e], e))
        for expert in spread:
            self._pour(expert, totals[expert])

    def quotas(self) -> IntArray:
        """Return the rows that each replica serves, int64 [E, R]."""
        quota_ER = np.zeros((len(self._rows), len(self._load)), dtype=np.int64)
        for expert, rows in enumerate(self._rows):
            quota_ER[expert, list(rows)] = list(rows.values())
        return quota_ER

    def pace(self, ranks_per_device: float) -> float:
        """Return when the last rank has served its rows, in rows."""
        return pace(self._load, ranks_per_device)

    def gradients_sent(
        self, *, held: Sequence[Sequence[int]], before: Sequence[Sequence[int]]
    ) -> list[float]:
        """Return the gradients that each rank sends, in experts, [R].

        Args:
            held: Ranks that hold each expert.
            before: Ranks that served each expert earlier in this step.
        """
        sent = [0.0] * len(self._load)
        for expert, rows in enumerate(self._rows):
            servers = [r for r, n in rows.items() if n > 0 or r in before[expert]]
            if servers:
                each = (len(servers) - 1 + len(held[expert]) - 1) / len(servers)
                for rank in servers:
                    sent[rank] += each
        return sent

    def level(self) -> None:
        """Move rows off the busiest rank until that is impossible or the load is level enough.

        If all replicas are open, the result is the rounded-up optimum of the linear program or
        within ``TOLERANCE`` of the mean load.

        Source: augmenting paths.
        """
        good_enough = int(self._floor * (1 + TOLERANCE))
        while (most := max(self._load)) > good_enough:
            path = self._path(self._load.index(most))
            if path is None:
                return
            self._move(path)

    def _pour(self, expert: int, left: int) -> None:
        """Distribute an expert's rows so that its least loaded replicas end at a common level."""
        rows, load = self._rows[expert], self._load
        ranks = sorted(self._open[expert], key=lambda r: (load[r], r))
        total, count = left, 0  # load and number of the ranks that are filled to one level
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
        """Find moves (from, expert, to) to the least loaded reachable rank, in reverse order."""
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
