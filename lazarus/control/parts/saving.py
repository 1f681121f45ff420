"""Checkpoints on their way to storage, their schedule, and the tokens a restore would cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lazarus.checkpoint.restoring.plt import PltLedger
from lazarus.checkpoint.selection.adaptive import Adapted, Measured


@dataclass(frozen=True, kw_only=True, slots=True)
class Save:
    """A checkpoint being written: each worker of its generation must report its share (JSON)."""

    generation: int
    seats: tuple[str, ...]
    shares: Mapping[str, str] = field(default_factory=dict)
    failed: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Saving:
    """Saves in flight and their schedule; ``saving/saves.py`` and ``adapting.py`` decide."""

    saves: Mapping[int, Save] = field(default_factory=dict)  # by step
    ordered: int = 0  # newest step whose manifest was ordered
    writing: tuple[int, ...] = ()  # steps of manifests that are being written
    plt: PltLedger = field(default_factory=PltLedger)
    plt_spent: float = 0.0  # PLT when K was last doubled
    doubling: bool = False  # the newest RESUME told the ranks to double K
    measured: Mapping[str, Measured] = field(default_factory=dict)  # by worker
    adapted: Adapted | None = None  # schedule of saves from measured rates; None: as configured
