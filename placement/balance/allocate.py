"""Compute the number of replicas of each expert from its load.

Shapes: L layers, E experts. All functions are deterministic; ties go to the expert with fewer
replicas, then to the lower id.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from placement.errors import InfeasiblePlacementError
from placement.request import Floats, Ints, as_load, positive_int

_ROUNDS = 64
_SORTABLE = 60_000  # layers x experts x nodes below which all grants are sorted


def allocate_replicas(
    load: Sequence[Any] | npt.NDArray[Any],
    *,
    num_slots: int,
    min_replicas: int | npt.NDArray[np.int32],
    max_replicas: int,
) -> Ints:
    """Compute replica counts that minimize the largest load per replica in every layer.

    The result equals exactly that of the greedy rule "the next slot goes to the expert with the
    largest load / replicas", which is optimal for this objective. Large problems bisect a
    threshold on the ratio for all layers at once and hand out the few remaining slots one by one.

    Args:
        load: Tokens per expert, [L, E] or [E], each >= 0.
        num_slots: Slots of the whole cluster for one layer.
        min_replicas: Fewest replicas of an expert, >= 1: one number, or int32 [L, E].
        max_replicas: Most replicas of an expert. Pass the number of nodes: a second replica on a
            node adds neither survival nor balance.

    Returns:
        int32 [L, E]; each row sums to ``min(num_slots, E * max_replicas)``.

    Raises:
        InfeasiblePlacementError: The floors need more slots than ``num_slots``, exceed
            ``max_replicas`` or are below 1.
        InvalidRequestError: The loads are invalid.
    """
    load_LE = _positive(as_load(load), max_replicas)
    floor_LE = np.broadcast_to(np.asarray(min_replicas, dtype=np.int32), load_LE.shape)
    check_floors(floor_LE, num_slots=num_slots, max_replicas=max_replicas)
    if load_LE.size * max_replicas <= _SORTABLE:
        return _by_sorting(load_LE, floor_LE, num_slots=num_slots, ceiling=max_replicas)
    return _by_bisection(load_LE, floor_LE, num_slots=num_slots, ceiling=max_replicas)


def _by_sorting(load_LE: Floats, floor_LE: Ints, *, num_slots: int, ceiling: int) -> Ints:
    """Sort all possible grants of a slot in the greedy rule's order; for small problems."""
    num_layers, num_experts = load_LE.shape
    held = np.arange(1, ceiling, dtype=np.float64)[:, None]
    worth = load_LE[:, None, :] / held
    worth[floor_LE[:, None, :] > held] = -1.0
    worth = worth.reshape(num_layers, -1)
    # Stable, and replicas run before experts: ties go to fewer replicas, then to the lower id.
    order = np.argsort(-worth, axis=1, kind="stable")
    spare_L = np.minimum(num_slots, num_experts * ceiling) - floor_LE.sum(1)
    granted = np.arange(worth.shape[1]) < spare_L[:, None]
    index = order % num_experts + np.arange(num_layers)[:, None] * num_experts
    extra = np.bincount(index[granted], minlength=load_LE.size)
    replicas: Ints = (floor_LE + extra.reshape(load_LE.shape)).astype(np.int32)
    return replicas


def _by_bisection(load_LE: Floats, floor_LE: Ints, *, num_slots: int, ceiling: int) -> Ints:
    total = min(num_slots, load_LE.shape[1] * ceiling)
    low_L = load_LE.min(1) / (2.0 * ceiling)
    high_L = load_LE.max(1)
    replicas = floor_LE.astype(np.int32)
    open_L = np.ones(len(load_LE), dtype=np.bool_)
    for _ in range(_ROUNDS):
        middle_L = np.sqrt(low_L * high_L)
        counts = _at_threshold(load_LE, floor_LE, middle_L, ceiling)
        sums_L = counts.sum(1)
        fits_L = sums_L <= total
        high_L = np.where(fits_L, middle_L, high_L)
        low_L = np.where(fits_L, low_L, middle_L)
        replicas = np.where((fits_L & open_L)[:, None], counts, replicas)
        open_L &= sums_L != total
        if not open_L.any() or float((high_L / low_L)[open_L].max()) <= 1.0 + 1e-15:
            break
    return _top_up(load_LE, replicas, total=total, ceiling=ceiling)


def _at_threshold(load_LE: Floats, floor_LE: Ints, limit_L: Floats, ceiling: int) -> Ints:
    """Replicas with every load / replicas <= limit, within floor and ceiling."""
    limit = limit_L[:, None]
    counts = np.minimum(np.ceil(load_LE / limit), ceiling + 1.0)
    # The rounded quotient may be off by one; correct it by the greedy rule's own comparison.
    counts += load_LE / np.maximum(counts, 1.0) > limit
    counts -= (counts > 1) & (load_LE / np.maximum(counts - 1.0, 1.0) <= limit)
    clipped: Ints = np.clip(counts, floor_LE, ceiling).astype(np.int32)
    return clipped


def _top_up(load_LE: Floats, replicas: Ints, *, total: int, ceiling: int) -> Ints:
    num_layers, num_experts = load_LE.shape
    rows_L = np.arange(num_layers)
    order_E = np.arange(num_experts)
    left_L = total - replicas.sum(1)
    while (left_L > 0).any():
        ratio = np.where(replicas < ceiling, load_LE / replicas, -1.0)
        tied = ratio >= ratio.max(1)[:, None]
        key = np.where(tied, replicas.astype(np.int64) * num_experts + order_E, np.int64(2**62))
        replicas[rows_L, key.argmin(1)] += left_L > 0
        left_L = left_L - (left_L > 0)
    return replicas


def _positive(load_LE: Floats, ceiling: int) -> Floats:
    """Loads with zeros replaced so that idle experts come last, and evenly."""
    least_L = np.where(load_LE > 0, load_LE, np.inf).min(1)
    least_L = np.where(np.isfinite(least_L), least_L, 1.0)
    return np.where(load_LE > 0, load_LE, (least_L / (2.0 * max(ceiling, 1)))[:, None])


def check_floors(floor_LE: Ints, *, num_slots: int, max_replicas: int) -> None:
    """Check that floors fit slots and nodes.

    Raises:
        InfeasiblePlacementError: The floors need more slots or more nodes than there are.
    """
    positive_int(max_replicas, name="max_replicas")
    if floor_LE.min() < 1:
        raise InfeasiblePlacementError(f"min_replicas={int(floor_LE.min())} must be >= 1")
    need = int(floor_LE.sum(1).max())
    experts = floor_LE.shape[1]
    if need > num_slots:
        raise InfeasiblePlacementError(
            f"{experts} experts need {need} slots for their floor of min_replicas, but there are "
            f"{num_slots}; add {need - num_slots} slots or lower min_replicas to "
            f"{num_slots // experts}"
        )
    if floor_LE.max() > max_replicas:
        raise InfeasiblePlacementError(
            f"min_replicas={int(floor_LE.max())} copies on distinct nodes need that many nodes, "
            f"but there are {max_replicas}; add nodes or lower min_replicas to {max_replicas}"
        )


def allocate_as_paper(
    load: Sequence[float], *, num_slots: int, min_replicas: int
) -> tuple[int, ...]:
    """Compute replica counts by the paper's rule, for comparison with ``allocate_replicas``.

    In ascending order of load, each expert gets its proportional share of the remaining slots,
    rounded down, but at least ``min_replicas``. An expert may get more replicas than there are
    nodes.

    Args:
        load: Tokens per expert of one layer, [E], each >= 0.
        num_slots: Slots of the whole cluster for one layer.
        min_replicas: Fewest replicas of an expert.

    Returns:
        Replicas per expert, [E].

    Raises:
        InfeasiblePlacementError: ``num_slots < E * min_replicas``.

    Source: Lazarus, equation 1, in exact rational arithmetic.
    """
    row = as_load(load)[0]
    floor = np.full((1, len(row)), min_replicas, dtype=np.int32)
    check_floors(floor, num_slots=num_slots, max_replicas=max(num_slots, 1))
    weights = [Fraction(float(w)) for w in row]
    if sum(weights) == 0:
        weights = [Fraction(1)] * len(weights)
    replicas = [0] * len(weights)
    left, mass = num_slots, sum(weights, Fraction(0))
    for expert in sorted(range(len(weights)), key=lambda e: (weights[e], e)):
        share = int(weights[expert] * left / mass) if mass else left
        replicas[expert] = max(share, min_replicas)
        left -= replicas[expert]
        mass -= weights[expert]
    return tuple(replicas)
