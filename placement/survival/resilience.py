"""Probability that every expert of every layer survives k lost nodes, exact wherever possible.

Node sets are grouped so that groups share no node. Given the number of dead nodes in each group,
groups are independent. Each group is therefore computed by the cheapest exact method that fits,
and the groups are combined.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

from placement.errors import InvalidRequestError
from placement.request import Floats
from placement.survival.bitmasks import components, mask_of, minimal_masks, nodes_of
from placement.survival.estimate import estimated_survival
from placement.survival.frontier import MAX_STATES, frontier_counts, frontier_probability
from placement.survival.interval import as_intervals, interval_survival, log_factorials
from placement.survival.truth import MAX_NODES, surviving_counts

METHODS = ("closed form", "truth table", "interval", "frontier", "estimate")
_FRONTIER_SIZE = 16_384  # nodes x sets above which even ordering the nodes takes too long
_EXACT_UP_TO = 64  # nodes for which counts are multiplied as integers


@dataclass(frozen=True, kw_only=True, slots=True)
class Survival:
    """Survival probabilities for k = 0, 1, ... lost nodes, and how they were found.

    Attributes:
        probability: P(every expert survives k uniformly chosen losses), by k.
        method: The costliest of ``METHODS`` that was needed; or "template bound" if no exact
            method was feasible and the values are proven lower bounds from the plan's template.
        low: Lower end of each interval; equal to ``probability`` if exact.
        high: Upper end of each interval.
    """

    probability: tuple[float, ...]
    method: str
    low: tuple[float, ...]
    high: tuple[float, ...]

    @property
    def exact(self) -> bool:
        """Whether the values are exact, neither estimated nor a bound."""
        return self.method not in ("estimate", "template bound")


def survival(
    masks: Sequence[int],
    *,
    num_nodes: int,
    max_losses: int | None = None,
    method: str = "auto",
    bound: Sequence[int] = (),
) -> Survival:
    """Compute the survival of node sets for k = 0..max_losses uniformly chosen losses.

    Args:
        masks: Node set of each expert as a bitmask; duplicates and supersets do not matter.
        num_nodes: Number of nodes, N.
        max_losses: Largest k; N when None.
        method: "auto", or one of ``METHODS`` to force that method.
        bound: Simpler node sets such that each of ``masks`` contains one of them. If given, their
            survival is used as a lower bound instead of an estimate.

    Raises:
        InvalidRequestError: A set is empty or has a node >= N, or the forced method is unknown or
            cannot handle these sets.
    """
    sets = _checked(masks, num_nodes, method)
    top = num_nodes if max_losses is None else max(0, min(max_losses, num_nodes))
    if method != "estimate":
        values, used = _by_groups(sets, num_nodes, top, method)
        if values is not None:
            exact = tuple(float(v) for v in values)
            return Survival(probability=exact, method=used, low=exact, high=exact)
        if method != "auto":
            raise InvalidRequestError(
                f"method {method!r} cannot do these {len(sets)} sets on {num_nodes} nodes; "
                "use 'auto'"
            )
    if bound and method == "auto":
        values, _ = _by_groups(_checked(bound, num_nodes, method), num_nodes, top, method)
        if values is not None:
            low = tuple(float(v) for v in values)
            sure = (1.0,) * len(low)
            return Survival(probability=low, method="template bound", low=low, high=sure)
    answers = [
        estimated_survival(sets, num_nodes=num_nodes, losses=k, seed=0) for k in range(top + 1)
    ]
    return Survival(
        probability=tuple(a[0] for a in answers),
        method="estimate",
        low=tuple(a[1] for a in answers),
        high=tuple(a[2] for a in answers),
    )


def _checked(masks: Sequence[int], num_nodes: int, method: str) -> tuple[int, ...]:
    if method != "auto" and method not in METHODS:
        raise InvalidRequestError(f"method {method!r} is none of {('auto', *METHODS)}")
    sets = minimal_masks(masks)
    if sets and sets[0] == 0:
        raise InvalidRequestError("an expert has no replica: its node set is empty")
    if sets and max(sets) >> num_nodes:
        raise InvalidRequestError(f"a node set reaches beyond the {num_nodes} nodes")
    return sets


def _by_groups(
    sets: Sequence[int], num_nodes: int, top: int, method: str
) -> tuple[Floats | None, str]:
    used = 0
    parts: list[tuple[int, Floats]] = []
    for group in components(sets):
        nodes = nodes_of(_union(group))
        index = {n: i for i, n in enumerate(nodes)}
        local = [mask_of(index[n] for n in nodes_of(m)) for m in group]
        values, how = _group(local, len(nodes), min(top, len(nodes)), method)
        if values is None:
            return None, method
        used = max(used, METHODS.index(how))
        parts.append((len(nodes), values))
    rest = num_nodes - sum(n for n, _ in parts)
    if rest:
        parts.append((rest, np.ones(min(top, rest) + 1)))
    return _product(parts, top), METHODS[used]


def _union(group: Sequence[int]) -> int:
    union = 0
    for mask in group:
        union |= mask
    return union


def _group(local: Sequence[int], n: int, top: int, method: str) -> tuple[Floats | None, str]:
    """P(group survives | k of its n nodes are dead), k = 0..top, and the method used."""
    if len(local) == 1 and method in ("auto", "closed form"):
        values = np.ones(top + 1)
        values[n:] = 0.0
        return values, "closed form"
    if method == "truth table" or (method == "auto" and n <= 14):
        if n > MAX_NODES:
            return None, method
        return _shares(surviving_counts(local, num_nodes=n), n, top), "truth table"
    intervals = as_intervals(local, num_nodes=n) if method in ("auto", "interval") else None
    if intervals is not None:
        return interval_survival(intervals, num_nodes=n, max_losses=top), "interval"
    if method == "auto" and n <= MAX_NODES and len(local) <= 64:
        return _shares(surviving_counts(local, num_nodes=n), n, top), "truth table"
    if method == "frontier" or (method == "auto" and n * len(local) <= _FRONTIER_SIZE):
        counts = frontier_counts(local, num_nodes=n, max_states=MAX_STATES)
        if counts is not None:
            return _shares(counts, n, top), "frontier"
    return None, method


def _shares(counts: Sequence[int], n: int, top: int) -> Floats:
    return np.array([counts[k] / comb(n, k) for k in range(top + 1)])


def _product(parts: Sequence[tuple[int, Floats]], top: int) -> Floats:
    """Combine groups: given k dead nodes in total, those of a group are hypergeometric."""
    size, values = parts[0] if parts else (0, np.ones(1))
    for other, theirs in parts[1:]:
        values = _pair(size, values, other, theirs, top)
        size += other
    return values


def _pair(n: int, p_n: Floats, m: int, p_m: Floats, top: int) -> Floats:
    answer = np.zeros(min(top, n + m) + 1)
    if n + m <= _EXACT_UP_TO:
        row_n = [comb(n, i) * float(p) for i, p in enumerate(p_n)]
        row_m = [comb(m, j) * float(p) for j, p in enumerate(p_m)]
        for a, x in enumerate(row_n):
            for b, y in enumerate(row_m[: len(answer) - a]):
                answer[a + b] += x * y
        return answer / [comb(n + m, k) for k in range(len(answer))]
    logs = log_factorials(n + m)
    k = np.arange(len(answer))
    below = logs[n + m] - logs[k] - logs[n + m - k]
    for j, y in enumerate(p_m.tolist()):
        if y == 0.0:
            continue
        i = k[j : min(len(answer), j + len(p_n), j + n + 1)] - j
        choose = logs[n] - logs[i] - logs[n - i] + logs[m] - logs[j] - logs[m - j]
        answer[i + j] += y * p_n[i] * np.exp(choose - below[i + j]).astype(np.float64)
    return np.minimum(answer, 1.0)


def survival_under_hazards(masks: Sequence[int], *, hazards: Sequence[float]) -> float | None:
    """Return P(every expert survives) if node i dies independently with probability ``hazards[i]``.

    The result is exact; None if an exact computation would take too long.
    """
    chance = 1.0
    for group in components(_checked(masks, len(hazards), "auto")):
        part = frontier_probability(group, hazards=hazards)
        if part is None:
            return None
        chance *= part
    return chance


def domain_masks(masks: Sequence[int], domain_of_node: Sequence[int]) -> tuple[int, ...]:
    """Convert node sets to sets of racks or zones (bitmasks); minimal ones only."""
    return minimal_masks(mask_of(domain_of_node[n] for n in nodes_of(m)) for m in masks)
