"""The shares of the nodes by their speed, and when the placement was last reconsidered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from placement.rebalance import Regret


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuning:
    """Measured speeds and the loads that follow from them; ``plans/tuning.py`` decides."""

    speeds: Mapping[int, float] = field(default_factory=dict)  # node -> share weight in force
    next_speeds: Mapping[int, float] = field(default_factory=dict)  # from the next RESUME on
    pace: Mapping[int, float] = field(default_factory=dict)  # node -> seconds per sample, smoothed
    streaks: Mapping[int, int] = field(default_factory=dict)  # node -> steps out of pace in a row
    regret: Regret = field(default_factory=Regret)
    looked: int = 0  # step at which rebalancing was last considered
