"""Exact survival for node sets that are intervals of one (cyclic) node order, for any N.

Dynamic programming along the node order. The table holds fractions of subsets, so that nothing
overflows, by number of dead nodes, so that the cost is small for few losses.

Shapes: K + 1 loss counts d = 0..K.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from placement.request import Floats
from placement.survival.bitmasks import nodes_of

Logs = npt.NDArray[np.longdouble]
Interval = tuple[int, int]
"""First node and length, 0-based; it may run over the end and go on at node 0."""


def as_intervals(masks: Sequence[int], *, num_nodes: int) -> tuple[Interval, ...] | None:
    """Convert node sets to cyclic intervals; None if a set is not an interval."""
    full = (1 << num_nodes) - 1
    found = []
    for mask in masks:
        size = mask.bit_count()
        if size == num_nodes:
            found.append((0, size))
            continue
        # A cyclic interval has exactly one node whose predecessor is not in the set.
        starts = mask & ~(((mask << 1) | (mask >> (num_nodes - 1))) & full)
        if starts.bit_count() != 1:
            return None
        found.append((nodes_of(starts)[0], size))
    return tuple(found)


def interval_survival(intervals: Sequence[Interval], *, num_nodes: int, max_losses: int) -> Floats:
    """Return P(no interval is entirely dead | d of N nodes are dead), for d = 0..max_losses.

    Args:
        intervals: Intervals of which none contains another one.

    Source: first-alive decomposition; conditioning on the first alive node for wrapped ones.
    """
    if not intervals:
        return np.ones(max_losses + 1)
    logs = log_factorials(num_nodes)
    plain = [(s, s + n) for s, n in intervals if s + n <= num_nodes]
    if len(plain) == len(intervals):
        return _line(plain, 0, num_nodes, max_losses, logs)
    return _ring(intervals, num_nodes, max_losses, logs)


def log_factorials(n: int) -> Logs:
    """Logarithms of 0!, 1!, ..., n! and possibly more, read-only."""
    return _logs_up_to(1 << max(n, 1).bit_length())


@lru_cache(maxsize=16)
def _logs_up_to(n: int) -> Logs:
    # Extended precision, because differences of large logarithms must be accurate to 1e-15.
    terms = np.log(np.arange(1, n + 1).astype(np.longdouble))
    logs = np.concatenate([np.zeros(1, dtype=np.longdouble), np.cumsum(terms)])
    logs.setflags(write=False)
    return logs


def _line(
    spans: Sequence[tuple[int, int]], tail: int, n: int, max_losses: int, logs: Logs
) -> Floats:
    """Survival on a line of n nodes, by number of dead nodes.

    ``spans`` are [start, end). A ``tail`` > 0 adds the span from that 1-based node to the end.
    """
    latest = np.zeros(n + 2, dtype=np.int64)  # by 1-based last node: the largest 1-based start
    for start, end in spans:
        latest[end] = max(latest[end], start + 1)
    before = np.maximum.accumulate(latest)
    dead = np.arange(max_losses + 1)
    table = np.zeros((n + 1, max_losses + 1))
    table[0, 0] = 1.0
    for j in range(1, n + 1):
        top = min(j, max_losses)
        d = dead[: top + 1]
        alive = j - d
        row = table[j - 1, : top + 1].copy()
        low = int(before[j - 1])
        if low:
            shift = j - low
            if top >= shift:
                k = d[shift:]
                usable = (k - shift <= low - 1) & (k <= j - 1)
                gone = k[usable]
                ratio = _ratio(low - 1, gone - shift, j - 1, gone, logs)
                row[gone] -= ratio * table[low - 1, gone - shift]
        row *= alive / j
        row[1:] += d[1:] / j * table[j - 1, :top]
        table[j, : top + 1] = row
    answer = table[n].copy()
    low = max(int(before[n]), tail)
    if low:
        shift = n - low + 1
        gone = np.arange(shift, min(max_losses, n) + 1)
        answer[gone] -= _ratio(low - 1, gone - shift, n, gone, logs) * table[low - 1, gone - shift]
    clipped: Floats = np.clip(answer, 0.0, 1.0)
    return clipped


def _ratio(
    a: int, i: npt.NDArray[np.int64], b: int, k: npt.NDArray[np.int64], logs: Logs
) -> Floats:
    """C(a, i) / C(b, k)."""
    upper = logs[a] - logs[i] - logs[a - i]
    ratio: Floats = np.exp(upper - (logs[b] - logs[k] - logs[b - k])).astype(np.float64)
    return ratio


def _ring(intervals: Sequence[Interval], num_nodes: int, max_losses: int, logs: Logs) -> Floats:
    origin, shortest = min(intervals, key=lambda x: (x[1], x[0]))
    turned = [((s - origin) % num_nodes, n) for s, n in intervals]
    answer = np.zeros(max_losses + 1)
    for first in range(min(shortest, num_nodes)):
        # Nodes 0..first-1 are dead, node ``first`` is alive; the rest is a line.
        rest = num_nodes - first - 1
        if max_losses < first:
            break
        spans, tail = [], 0
        for start, size in turned:
            end = start + size
            if end > num_nodes and end - num_nodes <= first:
                tail = max(tail, start - first)
            elif start > first and end <= num_nodes:
                spans.append((start - first - 1, end - first - 1))
        top = min(max_losses - first, rest)
        part = _line(spans, tail, rest, top, logs)
        k = np.arange(top + 1)
        answer[k + first] += _ratio(rest, k, num_nodes, k + first, logs) * part
    clipped: Floats = np.clip(answer, 0.0, 1.0)
    return clipped
