"""The routing table: replicas, shares and homes of one layer in one generation.

Shapes: R ranks, S slots per rank, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from dispatcher.errors import RoutingTableError

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutingTable:
    """Replicas of one layer, equal on all ranks except for ``rank``.

    Immutable. Use ``from_plan_arrays`` or ``solo`` to create a table.
    """

    rank: int
    generation: int
    expert_of_slot_RS: IntArray  # -1 = empty slot
    holds_ER: BoolArray
    shares_ER: FloatArray  # rows sum to 1; 0 on ranks without a replica
    home_E: IntArray  # rank that serves each expert in home mode

    @property
    def num_ranks(self) -> int:
        return int(self.holds_ER.shape[1])

    @property
    def num_experts(self) -> int:
        return int(self.holds_ER.shape[0])

    @classmethod
    def from_plan_arrays(
        cls,
        expert_of_slot_RS: Any,
        shares_ER: Any = None,
        *,
        rank: int,
        home_E: Any = None,
        generation: int = 0,
    ) -> RoutingTable:
        """Create a table from one layer of a plan.

        Args:
            expert_of_slot_RS: Expert in each slot, int [R, S], -1 for an empty slot.
            shares_ER: Share of each expert's tokens per rank, [E, R], rows summing to 1; None:
                equal shares.
            rank: The rank that will use this table.
            home_E: Rank that serves each expert in home mode, [E]; None: spread evenly over the
                ranks that hold replicas.
            generation: Generation of the table; handles of another generation are refused.

        Raises:
            RoutingTableError: An expert has no replica or two on one rank, shares do not sum to 1,
                or a share or home lies on a rank without the expert.
        """
        slots = np.ascontiguousarray(expert_of_slot_RS, dtype=np.int64)
        if slots.ndim != 2:
            raise RoutingTableError(f"expert_of_slot must be [ranks, slots], got {slots.shape}")
        if not 0 <= rank < slots.shape[0]:
            raise RoutingTableError(f"rank {rank} is not one of the table's {slots.shape[0]} ranks")
        shape = None if shares_ER is None else np.shape(shares_ER)
        num_experts = int(slots.max(initial=-1)) + 1 if shape is None else int(shape[0])
        holds = _holders(slots, num_experts=num_experts)
        shares = _checked_shares(holds, shares_ER)
        home = _even_homes(holds) if home_E is None else np.array(home_E, dtype=np.int64)
        _check_homes(home, holds)
        for array in (slots, holds, shares, home):
            array.setflags(write=False)
        return cls(
            rank=rank, generation=generation, expert_of_slot_RS=slots, holds_ER=holds,
            shares_ER=shares, home_E=home,
        )  # fmt: skip

    @classmethod
    def solo(cls, num_experts: int) -> RoutingTable:
        """Create the table of a single rank that holds every expert."""
        return cls.from_plan_arrays(np.arange(num_experts)[None, :], rank=0)

    def slots_of(self, rank: int) -> tuple[int, ...]:
        """Return the experts in the slots of ``rank``, -1 for an empty slot."""
        return self._slots_of[rank]

    @cached_property
    def _slots_of(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(int(e) for e in row) for row in self.expert_of_slot_RS)

    def ranks_of(self, expert: int) -> tuple[int, ...]:
        """Return the ranks that hold ``expert``, ascending."""
        return self._ranks_of[expert]

    @cached_property
    def at_home_RE(self) -> BoolArray:
        """Whether the rank is the expert's home, bool [R, E]."""
        at_home: BoolArray = np.arange(self.num_ranks)[:, None] == self.home_E[None, :]
        return at_home

    @cached_property
    def _ranks_of(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(int(r) for r in np.flatnonzero(row)) for row in self.holds_ER)


def _holders(slots_RS: IntArray, *, num_experts: int) -> BoolArray:
    if slots_RS.size and not -1 <= slots_RS.min() <= slots_RS.max() < num_experts:
        raise RoutingTableError(
            f"slots name experts {slots_RS.min()}..{slots_RS.max()} of {num_experts}"
        )
    copies = np.zeros((num_experts, slots_RS.shape[0]), dtype=np.int64)
    for rank, row in enumerate(slots_RS):
        np.add.at(copies[:, rank], row[row >= 0], 1)
    if (copies > 1).any():
        expert, rank = np.argwhere(copies > 1)[0]
        raise RoutingTableError(f"expert {expert} sits in two slots of rank {rank}; keep one")
    missing = np.flatnonzero(copies.sum(1) == 0)
    if missing.size:
        raise RoutingTableError(
            f"no rank holds expert {missing[0]} ({missing.size} of {num_experts} experts have no "
            f"replica on {slots_RS.shape[0]} ranks x {slots_RS.shape[1]} slots); "
            "place or restore it"
        )
    return copies.astype(np.bool_)


def _checked_shares(holds_ER: BoolArray, shares_ER: Any) -> FloatArray:
    if shares_ER is None:
        equal: FloatArray = holds_ER / holds_ER.sum(1, keepdims=True)
        return equal
    shares = np.array(shares_ER, dtype=np.float64)
    if shares.shape != holds_ER.shape:
        raise RoutingTableError(f"shares are {shares.shape}, the table is {holds_ER.shape}")
    if (shares < 0).any() or (shares[~holds_ER] != 0).any():
        raise RoutingTableError("a share is negative, or lies on a rank without the expert")
    totals = shares.sum(1)
    if np.abs(totals - 1).max(initial=0.0) > 1e-6:
        expert = int(np.abs(totals - 1).argmax())
        raise RoutingTableError(f"shares of expert {expert} sum to {totals[expert]:.6f}, not 1")
    # Normalize: with many copies an error of 1e-6 in the sum would be more than rounding.
    exact: FloatArray = shares / totals[:, None]
    return exact


def _even_homes(holds_ER: BoolArray) -> IntArray:
    """Assign homes, rarest expert first, to the holder with the fewest homes; ties: lowest rank."""
    home = np.zeros(holds_ER.shape[0], dtype=np.int64)
    homes_R = np.zeros(holds_ER.shape[1], dtype=np.int64)
    for expert in sorted(range(len(home)), key=lambda e: (int(holds_ER[e].sum()), e)):
        home[expert] = min(np.flatnonzero(holds_ER[expert]), key=lambda r: (homes_R[r], r))
        homes_R[home[expert]] += 1
    return home


def _check_homes(home_E: IntArray, holds_ER: BoolArray) -> None:
    num_experts, num_ranks = holds_ER.shape
    if home_E.shape != (num_experts,):
        raise RoutingTableError(f"home has shape {home_E.shape}, the table {num_experts} experts")
    inside = (home_E >= 0) & (home_E < num_ranks)
    if not inside.all() or not holds_ER[np.arange(num_experts), home_E].all():
        at = ~inside | ~holds_ER[np.arange(num_experts), np.where(inside, home_E, 0)]
        expert = int(np.flatnonzero(at)[0])
        raise RoutingTableError(f"home of expert {expert} is rank {home_E[expert]}, not a holder")


def expert_slots(expert_of_slot: Sequence[int]) -> dict[int, int]:
    """Return the slot of each expert on one rank."""
    return {int(e): slot for slot, e in enumerate(expert_of_slot) if e >= 0}
