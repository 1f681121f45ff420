"""How many experts a snapshot takes and how often, from measured rates. PURE.

K_snapshot is the largest that forward and backward hide; the interval on storage is the shortest
at which a persist has long ended when the next begins. Rates come from a clock, so the answers
are coarse (powers of two; 1, 2, 5, 10, ...) and change at a RESUME only, with which they are
journaled (protocol rule 34).
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
_BUSY = 0.5  # share of the time that storage may be written to


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveSettings:
    """The user's settings; None means ``auto``, to be found from measured rates."""

    every: int | None = DEFAULT_EVERY
    k_snapshot: int | None = None
    k_persist: int | None = None
    select: str = "sequential"

    @property
    def is_adaptive(self) -> bool:
        """Whether anything is left to find."""
        whole = self.select == FULL
        return self.every is None or (self.every > 0 and self.k_snapshot is None and not whole)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What one rank measured while it trained: bytes per second, seconds.

    ``window_s`` is the time from a commit's end to the next optimizer step, in which a snapshot
    is hidden; ``step_s`` that of a whole step.
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
        """Whether a change is worth stopping all ranks for: a factor of two somewhere."""
        pairs = (
            (self.k_snapshot, other.k_snapshot),
            (self.persist_every, other.persist_every),
        )
        return any(max(pair) >= 2 * min(pair) for pair in pairs)


def default_of(settings: SaveSettings, *, num_layers: int, num_experts: int) -> Adapted:
    """What ranks do before anything is measured."""
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
        settings: What the user fixed.
        measured: Of every rank; the slowest decides.
        num_layers: MoE layers.
        num_experts: Experts per layer.
        step_s: Seconds of a step.
        busiest: Bytes that the busiest rank saves at K experts per layer, dense share included.

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
    """``first``, doubled as long as it fits, and ``last``."""
    steps = [first]
    while steps[-1] < last:
        steps.append(min(2 * steps[-1], last))
    return steps


def rounded_up(steps: int) -> int:
    """The next of 1, 2, 5, 10, 20, 50, ..."""
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
    """Bytes of the rank that saves most when K experts per layer are saved, in rotation."""
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
