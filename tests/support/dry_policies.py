"""A placement policy as a user writes it, whose plans are not the library's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from placement import PlacementRequest, Plan, replan


class Skewed:
    """Plans as if the last expert of each layer were wanted most."""

    def __call__(
        self, request: PlacementRequest, *, previous: Plan | None, lost: frozenset[int]
    ) -> Plan:
        ramp = np.arange(1.0, request.load.shape[1] + 1)
        load = np.broadcast_to(ramp**2, request.load.shape).copy()
        return replan(replace(request, load=load), previous=previous, lost=lost)


class Wanting:
    """Cannot be made without an argument."""

    def __init__(self, needed: int) -> None:
        self.needed = needed
