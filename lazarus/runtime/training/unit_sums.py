"""Scalars of a step by unit: losses, counts and measures, added in the order of the units.

Each rank fills the lanes of the units that it computed. Summed over all ranks they are exact, since
all other ranks add zeros; every rank then adds the units in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lazarus.data.units import Units

Pair = tuple[float, float]  # weighted sum, weight


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitScalars:
    """What one unit adds to the step: sums of its loss and auxiliary loss, its count, measures."""

    total: float
    aux: float
    count: float
    measures: Mapping[str, Pair]


class UnitSums:
    """Collects the scalars of this rank's units in one step, and adds up those of all units."""

    def __init__(self, units: Units) -> None:
        self._units = units
        self._found: dict[int, UnitScalars] = {}

    def start(self) -> None:
        """Begin a step, or another attempt at the same step."""
        self._found = {}

    def put(self, unit: int, scalars: UnitScalars) -> None:
        """Keep the scalars of one unit that this rank computed."""
        self._found[unit] = scalars

    def lanes(self, names: Sequence[str]) -> NDArray[np.float64]:
        """This rank's lanes, float64 [U * (3 + 2 * names)], to be summed over all ranks."""
        rows = np.zeros((self._units.count, 3 + 2 * len(names)))
        for unit, found in self._found.items():
            pairs = [found.measures.get(name, (0.0, 0.0)) for name in names]
            rows[unit] = [found.total, found.aux, found.count, *np.ravel(pairs)]
        return rows.reshape(-1)

    def totals(self, lanes: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sums over the units in ascending order: total, aux, count, and each name's pair."""
        rows = lanes.reshape(self._units.count, -1)
        sums: NDArray[np.float64] = rows[0].copy()
        for row in rows[1:]:
            sums += row
        return sums
