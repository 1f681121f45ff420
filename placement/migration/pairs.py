"""Optimal assignment. SciPy is imported at the first one: that takes half a second and 30 MB.

A process that must be up at once, such as a controller that restarts, pays for it afterwards.
"""

from __future__ import annotations

from placement.request import Floats, Ints


def cheapest_pairs(costs: Floats) -> tuple[Ints, Ints]:
    """Rows and columns of the pairs that cost least in all, [N] each; ``costs`` is [N, N]."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(costs)
    return rows, columns
