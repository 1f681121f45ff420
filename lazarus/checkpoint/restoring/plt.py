"""Portion of lost tokens (PLT): the share of routed copies that restores have lost. PURE.

PLT = mean over MoE layers of lost routed copies / routed copies (the paper's T_i * TopK_i). Each
expert has a cumulative count of copies routed to it. A restore at count n from a version saved at
count v loses the copies in (v, n]. Copies lost twice (by an expert that is lost again before the
next save) count once: the ledger keeps the union of these spans.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

Span = tuple[int, int]  # copies (first, last] of one expert, by cumulative count


@dataclass(frozen=True, kw_only=True, slots=True)
class PltLedger:
    """Lost copies per (layer, expert), as disjoint ascending spans."""

    spans: Mapping[tuple[int, int], tuple[Span, ...]] = field(default_factory=dict)

    def lost(self, layer: int, expert: int) -> int:
        """Copies lost by one expert so far."""
        return sum(last - first for first, last in self.spans.get((layer, expert), ()))

    def lost_by_expert(self) -> dict[tuple[int, int], int]:
        """Lost copies of every expert that lost any."""
        return {key: self.lost(*key) for key in sorted(self.spans) if self.lost(*key)}

    def restored(
        self, *, layer: int, expert: int, version_routed: int, routed: int
    ) -> tuple[PltLedger, int]:
        """The ledger after a restore, and the number of copies that the restore newly lost.

        Args:
            layer: MoE layer.
            expert: Global expert id.
            version_routed: The expert's cumulative count in the restored version.
            routed: The expert's cumulative count at the resume step.

        Raises:
            ValueError: ``version_routed`` is above ``routed``.
        """
        if version_routed > routed:
            raise ValueError(f"a version of {version_routed} copies is ahead of {routed}")
        before = self.spans.get((layer, expert), ())
        first = min([version_routed, *(a for a, b in before if b >= version_routed)])
        after = (*((a, b) for a, b in before if b < version_routed), (first, routed))
        new = PltLedger(spans={**self.spans, (layer, expert): after})
        return new, new.lost(layer, expert) - self.lost(layer, expert)

    def rolled_back(self, routed: Sequence[Sequence[int]]) -> PltLedger:
        """The ledger after a rollback of all state to the step with the counts ``routed``."""
        spans = {
            (x, e): tuple((a, min(b, routed[x][e])) for a, b in old if a < routed[x][e])
            for (x, e), old in self.spans.items()
        }
        return replace(self, spans={key: value for key, value in spans.items() if value})

    def to_json(self) -> list[list[Any]]:
        """JSON-able form, for journals and manifests."""
        return [[x, e, [list(s) for s in spans]] for (x, e), spans in sorted(self.spans.items())]

    @classmethod
    def from_json(cls, data: Sequence[Sequence[Any]]) -> PltLedger:
        """The inverse of ``to_json``."""
        return cls(
            spans={
                (int(x), int(e)): tuple((int(a), int(b)) for a, b in spans) for x, e, spans in data
            }
        )


def portion_lost(lost: Mapping[tuple[int, int], int], *, routed: Sequence[Sequence[int]]) -> float:
    """The portion of lost tokens, as the MoC-System paper defines it.

    Args:
        lost: Lost copies per (layer, expert).
        routed: Cumulative routed copies, [layers][experts], over the whole training so far.

    Returns:
        A number in [0, 1]; 0 where nothing was routed.

    Source: MoC-System, equation 7.
    """
    if not routed:
        return 0.0
    per_layer = [0] * len(routed)
    for (layer, _), copies in lost.items():
        per_layer[layer] += copies
    totals = [sum(row) for row in routed]
    return sum(a / b for a, b in zip(per_layer, totals, strict=True) if b) / len(routed)


def staleness(
    versions: Sequence[Sequence[int]], *, routed: Sequence[Sequence[int]]
) -> dict[tuple[int, int], int]:
    """Copies that each expert would lose if it were restored from ``versions`` now.

    Args:
        versions: Cumulative counts in the newest version of each expert, [layers][experts].
        routed: Cumulative counts now, same shape.
    """
    return {
        (x, e): routed[x][e] - saved
        for x, row in enumerate(versions)
        for e, saved in enumerate(row)
        if routed[x][e] > saved
    }
