"""The commit vector: a float64 array whose sum over all ranks commits a step (rule 10).

Every lane is a sum. Counts and sample hashes stay exact, since they are integers below 2**53.
Lanes: L MoE layers, E experts, W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lazarus.errors import BrokenInvariantError

Lanes = NDArray[np.float64]

HASH_BITS = 40  # per sample and per rank; sums over 8,192 ranks stay below 2**53
HISTORY_DECAY = 0.9  # weight of the older load in the smoothed load, per committed step

_FIXED = (
    "members",
    "generation",
    "step",
    "samples",
    "count",
    "sample_hash",
    "loss_sum",
    "aux_sum",
    "found_inf",
    "pause",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class VectorLayout:
    """Positions of the lanes for a given world size and model shape."""

    world_size: int
    num_layers: int
    num_experts: int

    @property
    def num_lanes(self) -> int:
        """Number of lanes, without the measures that may follow."""
        return len(_FIXED) + self.world_size + 2 * self.num_layers * self.num_experts

    def lane(self, name: str) -> int:
        """Index of one of the fixed lanes, by name."""
        return _FIXED.index(name)

    @property
    def times(self) -> slice:
        """Lanes with each rank's seconds of own compute in the step, one per rank."""
        return slice(len(_FIXED), len(_FIXED) + self.world_size)

    @property
    def counts(self) -> slice:
        """Lanes of the routed copies, row-major [L, E]."""
        start = len(_FIXED) + self.world_size
        return slice(start, start + self.num_layers * self.num_experts)

    @property
    def squares(self) -> slice:
        """Lanes of the squared gradient sums of experts, row-major [L, E]; one rank fills each."""
        start = self.counts.stop
        return slice(start, start + self.num_layers * self.num_experts)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSums:
    """A decoded commit vector: the sums over all ranks for one step."""

    step: int
    samples: int
    count: float
    sample_hash: int
    loss_sum: float
    aux_sum: float
    found_inf: bool
    pause: bool
    times: tuple[float, ...]
    counts: NDArray[np.float64]
    squares: NDArray[np.float64]

    @property
    def loss(self) -> float:
        """Mean loss over all counted tokens; NaN if there are none."""
        return self.loss_sum / self.count if self.count > 0 else float("nan")

    @property
    def skips(self) -> bool:
        """Whether the step is committed without an update, because a value is not finite."""
        return self.found_inf or not bool(np.isfinite(self.squares.sum()))

    @property
    def skip_reason(self) -> str:
        """The reason for skipping: the loss or else the gradient norm is not finite."""
        if np.isfinite(self.loss_sum):
            return "the gradient norm is not finite"
        return "the loss is not finite"


def contribution(
    layout: VectorLayout,
    *,
    rank: int,
    generation: int,
    step: int,
    samples: int,
    count: float,
    sample_hash: int,
    loss_sum: float,
    aux_sum: float,
    found_inf: bool,
    pause: bool,
    own_s: float,
) -> Lanes:
    """One rank's summand; the caller fills in the count and square lanes.

    Returns:
        float64 [num_lanes].
    """
    lanes = np.zeros(layout.num_lanes, dtype=np.float64)
    lanes[: len(_FIXED)] = (
        1.0,
        float(generation),
        float(step),
        float(samples),
        count,
        float(sample_hash % (1 << HASH_BITS)),
        loss_sum,
        aux_sum,
        float(found_inf),
        float(pause),
    )
    lanes[layout.times.start + rank] = own_s
    return lanes


def decode(layout: VectorLayout, lanes: Lanes) -> StepSums:
    """Read a summed vector.

    Raises:
        BrokenInvariantError: The lanes are not the sum of one contribution per rank to one step.
    """
    if lanes.ndim != 1 or lanes.size < layout.num_lanes:  # measures may follow
        raise BrokenInvariantError(
            f"commit vector has {lanes.size} lanes, the layout {layout.num_lanes}"
        )
    members, generation_sum, step_sum = (int(lanes[i]) for i in range(3))
    world = layout.world_size
    if members != world or generation_sum % world or step_sum % world:
        raise BrokenInvariantError(
            f"commit vector sums {members} members, generation sum {generation_sum} and step sum "
            f"{step_sum} over {world} ranks"
        )
    shape = (layout.num_layers, layout.num_experts)
    return StepSums(
        step=step_sum // world,
        samples=int(lanes[layout.lane("samples")]),
        count=float(lanes[layout.lane("count")]),
        sample_hash=int(lanes[layout.lane("sample_hash")]) % (1 << HASH_BITS),
        loss_sum=float(lanes[layout.lane("loss_sum")]),
        aux_sum=float(lanes[layout.lane("aux_sum")]),
        found_inf=lanes[layout.lane("found_inf")] > 0,
        pause=lanes[layout.lane("pause")] > 0,
        times=tuple(lanes[layout.times].tolist()),
        counts=lanes[layout.counts].reshape(shape),
        squares=lanes[layout.squares].reshape(shape),
    )


def sample_hash(sample_ids: Sequence[int] | NDArray[np.int64], *, step: int) -> int:
    """Hash of a step's samples in any order: the sum of their mixed ids, modulo 2**40."""
    ids = np.asarray(sample_ids, dtype=np.uint64)
    with np.errstate(over="ignore"):
        mixed = (ids + np.uint64(step) * np.uint64(0x9E3779B97F4A7C15)) * np.uint64(
            0xBF58476D1CE4E5B9
        )
        mixed ^= mixed >> np.uint64(29)
        mixed *= np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(32)
    mask = np.uint64((1 << HASH_BITS) - 1)
    return int(sum(int(x) for x in mixed & mask) % (1 << HASH_BITS))


def start_history(num_layers: int, num_experts: int) -> NDArray[np.float64]:
    """The load history before step 1.

    Returns:
        float64 [3, L, E]: smoothed copies, copies since step 1, copies of the last step.
    """
    return np.zeros((3, num_layers, num_experts), dtype=np.float64)


def advance_history(
    history: NDArray[np.float64], counts: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The load history after one more committed step; bitwise equal on every rank.

    Args:
        history: float64 [3, L, E], as ``start_history`` returns.
        counts: float64 [L, E], routed copies of the step.
    """
    smoothed = history[0] * HISTORY_DECAY + counts * (1.0 - HISTORY_DECAY)
    return np.stack([smoothed, history[1] + counts, counts])
