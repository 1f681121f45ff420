"""The messages that were dropped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejected:
    """Dropped messages: late ones are counted, malformed ones judged by ``refusals.py``."""

    stale: int = 0  # messages of older generations, dropped
    num_refused: int = 0  # malformed messages, dropped
    dropped: Mapping[str, tuple[str, str]] = field(  # worker -> its last malformed message, and why
        default_factory=dict
    )
