"""Units: a step's samples cut in one fixed way, whatever the number of ranks, and dealt by rounds.

A training mode whose result does not depend on the number of ranks may only add numbers in an order
that the units give. Shapes: B samples of a step (the global batch), U units, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Units:
    """The units of every step: ``unit_size`` consecutive samples each, the last one perhaps fewer.

    Args:
        global_batch: Samples of a step, B.
        unit_size: Samples of a unit.

    Raises:
        ValueError: A number is < 1.
    """

    global_batch: int
    unit_size: int

    def __post_init__(self) -> None:
        if self.global_batch < 1 or self.unit_size < 1:
            raise ValueError(
                f"global_batch={self.global_batch}, unit_size={self.unit_size}: each must be >= 1"
            )

    @property
    def count(self) -> int:
        """U: the number of units of a step."""
        return -(-self.global_batch // self.unit_size)

    def samples(self, unit: int) -> range:
        """Positions of a unit's samples in the step."""
        begin = unit * self.unit_size
        return range(begin, min(begin + self.unit_size, self.global_batch))

    def num_rounds(self, num_ranks: int) -> int:
        """Rounds that the ranks need for all units."""
        return -(-self.count // num_ranks)

    def dealt(self, rank: int, num_ranks: int) -> tuple[int | None, ...]:
        """The unit that a rank computes in each round; None in a round without one.

        Round j deals the units ``j * R`` to ``j * R + R - 1`` to the ranks in their order, so that
        every round adds to sums in ascending order of units.
        """
        dealt = (number * num_ranks + rank for number in range(self.num_rounds(num_ranks)))
        return tuple(unit if unit < self.count else None for unit in dealt)

    def slowdown(self, num_ranks: int) -> float:
        """Rounds times ranks over units: 1 if every rank has a unit in every round, else more."""
        return self.num_rounds(num_ranks) * num_ranks / self.count
