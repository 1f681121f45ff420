"""Optimal assignment by SciPy, which is imported on first use.

The import takes half a second and 30 MB; a controller that restarts should not wait for it.
"""

from __future__ import annotations

from placement.request import Floats, Ints


def cheapest_pairs(costs: Floats) -> tuple[Ints, Ints]:
    """Return rows and columns, [N] each, of the cheapest perfect matching; ``costs`` is [N, N]."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(costs)
    return rows, columns
