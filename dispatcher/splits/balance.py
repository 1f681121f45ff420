"""How many rows each replica is to serve, so that the busiest rank has little and few replicas
serve at all.

With one device per rank the busiest rank sets the pace; but replicas that serve must have their
gradients summed. Both are counted in rows, for the rank that has most of each:
``busiest rank's rows + rows_per_replica * busiest sender's gradients``, where a sender's gradients
are counted in experts: of an expert with h replicas, v of them serving, each server sends
``(v - 1 + h - 1) / v`` (its slices to their owners, its own slice to all holders). Where ranks
share devices, or the cores of one machine, the busiest rank goes on alone once the others are done:
``pace`` then takes its place in both terms, so that replicas on idle ranks are not free either.

Everything is arithmetic in a fixed order on equal input, so every rank finds the same quotas.

Shapes: E experts, R ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from dispatcher.splits.routing import BoolArray, FloatArray, IntArray, RoutingTable

TOLERANCE = 0.01  # stop within this of the mean load: no plan can do better than the mean


def balanced_quotas(
    total_E: IntArray,
    table: RoutingTable,
    *,
    rows_per_replica: float = 0.0,
    ranks_per_device: float = 1.0,
    served_ER: BoolArray | None = None,
) -> IntArray:
    """Rows that each replica serves, [E, R].

    Args:
        total_E: Copies routed to each expert by all ranks.
        table: Replicas and homes.
        rows_per_replica: Rows that take as long as sending one expert's gradient. 0: the busiest
            rank's optimum over all replicas, at no regard for traffic.
        ranks_per_device: How many ranks share one device's time, on average.
        served_ER: Replicas that have served in this step already: their gradients travel anyway.
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


def split_cost(
    quota_ER: IntArray,
    table: RoutingTable,
    *,
    rows_per_replica: float,
    ranks_per_device: float = 1.0,
    served_ER: BoolArray | None = None,
) -> float:
    """What these quotas cost in rows: the busiest rank's, and the busiest sender's gradients.

    The slow twin of what ``balanced_quotas`` counts.
    """
    serving_ER = quota_ER > 0
    if served_ER is not None:
        serving_ER = serving_ER | served_ER
    rows = pace(quota_ER.sum(0).tolist(), ranks_per_device)
    sent = gradients_sent(serving_ER, table).tolist()
    return rows + rows_per_replica * pace(sent, ranks_per_device)


def pace(work_R: Sequence[float], ranks_per_device: float = 1.0) -> float:
    """When the last rank is done if all begin together, in units of the work.

    With a device for each rank: the most work of any. Where they share, the ranks that still have
    work split all devices' time evenly, and none is faster than one device.
    """
    if ranks_per_device <= 1:
        return max(work_R, default=0.0)
    devices = len(work_R) / ranks_per_device
    done, last = 0.0, 0.0
    for finished, work in enumerate(sorted(work_R)):
        done += (work - last) * max(1.0, (len(work_R) - finished) / devices)
        last = work
    return done


def gradients_sent(served_ER: BoolArray, table: RoutingTable) -> FloatArray:
    """Gradients that each rank sends when these replicas served, in experts, [R]."""
    servers_E = served_ER.sum(1)
    each_E = (servers_E - 1 + table.holds_ER.sum(1) - 1) / np.maximum(servers_E, 1)
    sent_R: FloatArray = (served_ER * each_E[:, None]).sum(0)
    return sent_R


def levelled_quotas(total_E: IntArray, table: RoutingTable, *, open_ER: BoolArray) -> IntArray:
    """Rows per replica that make the busiest rank's least, with only the open replicas serving."""
    opened = [[r for r, is_open in enumerate(row) if is_open] for row in open_ER.tolist()]
    loads = _Loads(total_E.tolist(), opened, num_ranks=table.num_ranks)
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
        """Rows that each replica serves, [E, R]."""
        quota_ER = np.zeros((len(self._rows), len(self._load)), dtype=np.int64)
        for expert, rows in enumerate(self._rows):
            quota_ER[expert, list(rows)] = list(rows.values())
        return quota_ER

    def pace(self, ranks_per_device: float) -> float:
        """When the last rank has served its rows, in rows."""
        return pace(self._load, ranks_per_device)

    def gradients_sent(
        self, *, held: Sequence[Sequence[int]], before: Sequence[Sequence[int]]
    ) -> list[float]:
        """Gradients that each rank sends, given who holds and who served before, [R]."""
        sent = [0.0] * len(self._load)
        for expert, rows in enumerate(self._rows):
            servers = [r for r, n in rows.items() if n > 0 or r in before[expert]]
            if servers:
                each = (len(servers) - 1 + len(held[expert]) - 1) / len(servers)
                for rank in servers:
                    sent[rank] += each
        return sent

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
        rows, load = self._rows[expert], self._load
        ranks = sorted(self._open[expert], key=lambda r: (load[r], r))
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
