"""Choose the number of experts per snapshot and the save intervals from measured rates. PURE.

K_snapshot is the largest for which the copy is hidden behind forward and backward. The interval of
checkpoints on storage is the shortest at which storage is written to at most half of the time.
Measured rates vary, so the results are coarse (K is doubled; intervals are 1, 2, 5, 10, ...). They
change only at a RESUME, together with which they are journaled (protocol rule 34).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from lazarus.checkpoint.selection.schedule import (
    FULL,
    ScheduleConfig,
    default_schedule,
    largest_hidden_k,
    shortest_interval,
)
from lazarus.checkpoint.selection.sharding import Unit, split_adaptively

DEFAULT_EVERY = 200  # steps between checkpoints on storage until rates are known
_BUSY = 0.5  # fraction of the time in which storage may be written to


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveSettings:
    """The user's checkpoint settings. None means ``auto``: chosen from measured rates."""

    every: int | None = DEFAULT_EVERY
    k_snapshot: int | None = None
    k_persist: int | None = None
    select: str = "sequential"

    @property
    def is_adaptive(self) -> bool:
        """Whether any setting is to be chosen from measured rates."""
        whole = self.select == FULL
        return self.every is None or (self.every > 0 and self.k_snapshot is None and not whole)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Rates that one rank measured while training, in bytes per second, and its copy window.

    ``window_s`` is the time from the end of a commit to the next optimizer step, in which a
    snapshot's copy costs no training time.
    """

    copy_rate: float
    write_rate: float
    window_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapted:
    """A schedule: experts per layer and steps between saves."""

    k_snapshot: int
    snapshot_every: int
    persist_every: int

    def is_far_from(self, other: Adapted) -> bool:
        """Whether ``k_snapshot`` or ``persist_every`` differs by a factor of two or more.

        Smaller changes are not worth stopping all ranks for.
        """
        pairs = (
            (self.k_snapshot, other.k_snapshot),
            (self.persist_every, other.persist_every),
        )
        return any(max(pair) >= 2 * min(pair) for pair in pairs)


def default_of(settings: SaveSettings, *, num_layers: int, num_experts: int) -> Adapted:
    """The schedule that ranks use before anything is measured."""
    schedule = _unmeasured(settings, num_layers, num_experts)
    return Adapted(
        k_snapshot=schedule.k_snapshot,
        snapshot_every=schedule.snapshot_every,
        persist_every=schedule.persist_every,
    )


def _unmeasured(settings: SaveSettings, num_layers: int, num_experts: int) -> ScheduleConfig:
    return default_schedule(
        num_layers=num_layers,
        num_experts=num_experts,
        every=settings.every or DEFAULT_EVERY,
        k_snapshot=settings.k_snapshot,
        k_persist=settings.k_persist,
        select=settings.select,
    )


def adapt(
    settings: SaveSettings,
    measured: Collection[Measured],
    *,
    num_layers: int,
    num_experts: int,
    step_s: float,
    busiest: Callable[[int], int],
) -> Adapted:
    """The schedule that the measured rates allow.

    Args:
        settings: The user's settings; values other than ``auto`` stay.
        measured: Measurements of all ranks; the slowest rank decides.
        num_layers: MoE layers.
        num_experts: Experts per layer.
        step_s: Seconds of one step.
        busiest: Returns the bytes that the busiest rank saves for a given number of experts per
            layer, dense share included.

    Source: MoC-System, adaptive configuration.
    """
    default = _unmeasured(settings, num_layers, num_experts)
    k_snapshot = default.k_snapshot
    if settings.k_snapshot is None and settings.select != FULL:
        ladder = ladder_of(default.k_persist, num_experts)
        place = largest_hidden_k(
            bytes_of_k=[busiest(k) for k in ladder],
            bytes_per_s=min(m.copy_rate for m in measured),
            window_s=min(m.window_s for m in measured),
        )
        k_snapshot = ladder[place - 1]
    every = settings.every
    if every is None:
        shortest = shortest_interval(
            bytes_of_busiest_writer=busiest(default.k_persist),
            bytes_per_s=_BUSY * min(m.write_rate for m in measured),
            step_s=step_s,
        )
        every = rounded_up(shortest)
    schedule = default_schedule(
        num_layers=num_layers,
        num_experts=num_experts,
        every=every,
        k_snapshot=k_snapshot,
        k_persist=default.k_persist,
        select=settings.select,
    )
    return Adapted(
        k_snapshot=schedule.k_snapshot,
        snapshot_every=schedule.snapshot_every,
        persist_every=schedule.persist_every,
    )


def ladder_of(first: int, last: int) -> list[int]:
    """The values of K to try: ``first``, doubled while below ``last``, and ``last``."""
    steps = [first]
    while steps[-1] < last:
        steps.append(min(2 * steps[-1], last))
    return steps


def rounded_up(steps: int) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, ... that is not below ``steps``."""
    unit = 1
    while steps > 10 * unit:
        unit *= 10
    return next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= steps)


def busiest_rank(
    k: int,
    *,
    ranks_of: Callable[[int, int], Sequence[int]],
    num_ranks: int,
    num_layers: int,
    num_experts: int,
    expert_bytes: int,
    dense_bytes: int,
) -> int:
    """Bytes that the busiest rank saves when ``k`` experts per layer are saved in rotation.

    Args:
        k: Experts per layer.
        ranks_of: Returns the ranks that hold (layer, expert).
        num_ranks: Ranks of the run.
        num_layers: MoE layers.
        num_experts: Experts per layer.
        expert_bytes: Bytes of one expert.
        dense_bytes: Bytes of the whole dense state, shared equally by all ranks.
    """
    units = [
        Unit(
            key=(layer, expert),
            num_bytes=expert_bytes,
            holders=tuple(sorted(ranks_of(layer, expert))),
        )
        for layer in range(num_layers)
        for expert in sorted((layer + i) % num_experts for i in range(k))
    ]
    share = -(-dense_bytes // num_ranks)
    return share + split_adaptively(units, num_ranks=num_ranks).bottleneck()
