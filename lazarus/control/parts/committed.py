"""The committed steps: vectors, load history, and what was published about them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lazarus.control.messages import Vector


@dataclass(frozen=True, kw_only=True, slots=True)
class Committed:
    """What is known of the steps up to ``Control.step``; ``commit/commits.py`` adds to it."""

    known: Mapping[int, Vector] = field(default_factory=dict)  # decided, not yet published
    newest: Vector | None = None  # vector of the newest journaled commit; members may lack it
    flushed_s: float = 0.0
    step_s: float = 0.0  # duration of the last committed step
    history: NDArray[np.float64] = field(  # load history at `step`, [3, L, E]; never written to
        default_factory=lambda: np.zeros((3, 0, 0), dtype=np.float64)
    )
    evaluated: int = 0  # step of the last evaluation that was published

    @property
    def routed(self) -> NDArray[np.int64]:
        """Cumulative routed copies [L, E] at ``Control.step``."""
        counts: NDArray[np.int64] = self.history[1].astype(np.int64)
        return counts
