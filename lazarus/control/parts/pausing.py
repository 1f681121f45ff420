"""The pause of all ranks after the same step, which every planned change waits for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class Pausing:
    """Why a pause is wanted and who has paused; ``machine.py`` orders it and acts after it."""

    wants: str = ""  # why all ranks should pause; empty: no pause is wanted
    whole_asked: int = 0  # pauses for a full checkpoint since the last persisted one
    whole_again_s: float = 0.0  # no further such pause before this time
    paused: Mapping[str, int] = field(default_factory=dict)
    paused_s: float = 0.0  # when the last rank paused
    pause_sent: bool = False
