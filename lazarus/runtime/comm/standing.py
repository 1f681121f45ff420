"""What a rank holds from RESUME to the next fence, as one value that nothing changes."""

from __future__ import annotations

from dataclasses import dataclass

from dispatcher.exchange import Exchange
from lazarus.control.messages import Seat
from placement import Plan


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """One rank's place in one generation. Made at RESUME, and given up when the rank is fenced.

    Attributes:
        generation: The generation.
        term: Term of the controller that ordered the generation.
        step: The step that was committed last when the generation began.
        plan: The generation's plan, with the replicas that background healing has yet to bring.
        exchange: The collectives of the generation's training group.
        seats: Worker, node and keeper of each rank.
        speeds: Relative speed of each rank; empty if all are taken as equally fast.
    """

    generation: int
    term: int
    step: int
    plan: Plan
    exchange: Exchange
    seats: tuple[Seat, ...] = ()
    speeds: tuple[float, ...] = ()

    @property
    def rank(self) -> int:
        return self.exchange.rank

    @property
    def size(self) -> int:
        return self.exchange.size

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which sends what all ranks know to the controller."""
        return self.exchange.rank == 0

    @property
    def nodes(self) -> list[int]:
        """The node of each rank."""
        return [seat.node for seat in self.seats]

    @property
    def keepers(self) -> list[str]:
        """The address of each rank's keeper."""
        return [seat.keeper for seat in self.seats]
