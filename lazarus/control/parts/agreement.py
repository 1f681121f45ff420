"""Whether replicas of the same state agree, and who was found to differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class Outvoted:
    """State that differs from that of the majority of ranks and is not repaired yet."""

    workers: frozenset[str] = frozenset()  # whose dense state differs
    copies: frozenset[tuple[str, int, int]] = frozenset()  # (worker, layer, expert)

    def __bool__(self) -> bool:
        return bool(self.workers or self.copies)

    def less(self, known: Outvoted) -> Outvoted:
        """The part of this evidence that ``known`` does not contain."""
        return Outvoted(workers=self.workers - known.workers, copies=self.copies - known.copies)


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """Replicas that differ and whom that speaks against; ``reconfiguration/repair.py`` judges."""

    outvoted: Outvoted = field(default_factory=Outvoted)
    outvotes: Mapping[int, tuple[int, ...]] = field(default_factory=dict)  # node -> steps
    suspects: tuple[tuple[int, int], ...] = ()  # (node, step) of nodes evicted for being outvoted
    ties: tuple[int, ...] = ()  # steps at which state differed without a majority
    undecided: bool = False  # replicas differ without a majority: a fence is due
