"""Choose the experts that each snapshot and each checkpoint saves. PURE.

A snapshot copies K_snapshot experts per layer to host memory; K_persist of them are also written
to storage. Each level rotates with its own cursor and saves every expert once in ceil(E / K)
rounds. Persisted experts are always part of the snapshot of the same step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lazarus.checkpoint.format.manifest import OPTIMIZER, PARTS, WEIGHTS

SEQUENTIAL, BY_LOAD, FULL = "sequential", "load", "full"
SELECTIONS = (SEQUENTIAL, BY_LOAD, FULL)
_USED_WINDOW = 0.8  # fraction of the time between two optimizer steps that a copy may fill

Experts = tuple[tuple[int, ...], ...]  # [layer] -> chosen expert ids, ascending


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """Settings of the rotation.

    ``parts`` says to which parts the partial selection applies: to weights and optimizer state
    (``WO``), to weights (``W``) or to optimizer state (``O``) only. The other part is then saved
    for every expert each time.
    """

    num_layers: int
    num_experts: int
    select: str = SEQUENTIAL
    k_snapshot: int
    k_persist: int
    snapshot_every: int  # steps
    persist_every: int  # steps, a multiple of snapshot_every
    parts: str = "WO"
    plt_budget: float = 0.0375

    def __post_init__(self) -> None:
        if not 1 <= self.k_persist <= self.k_snapshot <= self.num_experts:
            raise ValueError(
                f"need 1 <= k_persist <= k_snapshot <= experts, have {self.k_persist}, "
                f"{self.k_snapshot}, {self.num_experts}"
            )
        if self.snapshot_every < 1 or self.persist_every % self.snapshot_every:
            raise ValueError(
                f"persist_every={self.persist_every} is no multiple of "
                f"snapshot_every={self.snapshot_every}"
            )
        if self.select not in SELECTIONS or self.parts not in {"WO", "W", "O"}:
            raise ValueError(f"unknown select={self.select!r} or parts={self.parts!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleState:
    """Position of the rotation; part of the run's journaled state.

    ``persisted_once`` is False until a first full checkpoint was selected: a partial checkpoint
    needs older versions to point to. ``doublings`` counts how often Dynamic-K doubled K. The
    intervals (steps) come from measured rates; 0 means as configured.
    """

    k_snapshot: int
    k_persist: int
    snapshot_cursor: int = 0
    persist_cursor: int = 0
    persisted_once: bool = False
    doublings: int = 0
    snapshot_every: int = 0
    persist_every: int = 0

    @classmethod
    def initial(cls, config: ScheduleConfig) -> ScheduleState:
        """The state before the first checkpoint."""
        return cls(k_snapshot=config.k_snapshot, k_persist=config.k_persist)


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """The experts that one step saves: in the snapshot, and of these on storage.

    ``persist`` has an empty tuple for each layer if nothing is written to storage.
    """

    snapshot: Experts
    persist: Experts

    @property
    def persists(self) -> bool:
        """Whether this step makes a checkpoint on storage."""
        return any(self.persist)

    def is_full(self, num_experts: int) -> bool:
        """Whether this step makes a checkpoint of all experts."""
        return bool(self.persist) and all(len(layer) == num_experts for layer in self.persist)


def select_experts(
    state: ScheduleState,
    config: ScheduleConfig,
    *,
    step: int,
    unsaved: Sequence[Sequence[int]],
) -> tuple[Selection, ScheduleState] | None:
    """Select the experts to save after ``step``.

    Args:
        state: The rotation's state before the step.
        config: The schedule.
        step: The step just committed, >= 1.
        unsaved: Routed copies since each expert's last snapshot, [layers][experts]; used by
            load-aware selection only.

    Returns:
        The selection and the rotation's state after it; None if the step saves nothing.
    """
    snapshot_every = state.snapshot_every or config.snapshot_every
    persist_every = state.persist_every or config.persist_every
    if step % persist_every == 0 and not state.persisted_once:
        everything = tuple(tuple(range(config.num_experts)) for _ in range(config.num_layers))
        after = replace(state, persisted_once=True)
        return Selection(snapshot=everything, persist=everything), after
    if step % snapshot_every:
        return None
    persists = step % persist_every == 0
    k_snapshot, k_persist = _sizes(state, config)
    layers = range(config.num_layers)
    persist: Experts = tuple(() for _ in layers)
    if persists:
        persist = tuple(
            _chosen(config, unsaved[x], layer=x, cursor=state.persist_cursor, k=k_persist)
            for x in layers
        )
    snapshot = tuple(
        _filled(
            persist[x],
            _ranked(config, unsaved[x], layer=x, cursor=state.snapshot_cursor),
            k=k_snapshot,
        )
        for x in layers
    )
    after = replace(
        state,
        snapshot_cursor=_advanced(state, config, persists=persists),
        persist_cursor=(state.persist_cursor + k_persist * persists) % config.num_experts,
    )
    return Selection(snapshot=snapshot, persist=persist), after


def _advanced(state: ScheduleState, config: ScheduleConfig, *, persists: bool) -> int:
    """The snapshot cursor after this step, moved past all consecutive experts just saved."""
    k_snapshot, k_persist = _sizes(state, config)
    count = config.num_experts
    saved = {(state.persist_cursor + i) % count for i in range(k_persist * persists)}
    cursor, passed, room = state.snapshot_cursor, 0, k_snapshot - len(saved)
    while passed < count and (cursor in saved or room):
        room -= cursor not in saved
        cursor, passed = (cursor + 1) % count, passed + 1
    return cursor


def _sizes(state: ScheduleState, config: ScheduleConfig) -> tuple[int, int]:
    if config.select == FULL:
        return config.num_experts, config.num_experts
    return max(state.k_snapshot, state.k_persist), state.k_persist


def _ranked(
    config: ScheduleConfig, unsaved: Sequence[int], *, layer: int, cursor: int
) -> tuple[int, ...]:
    """All experts of a layer in the order in which they are to be saved."""
    count = config.num_experts
    rotation = tuple((cursor + layer + i) % count for i in range(count))
    if config.select == BY_LOAD:
        # The rotation breaks ties, so that idle experts are saved too.
        return tuple(sorted(rotation, key=lambda e: -unsaved[e]))
    return rotation


def _chosen(
    config: ScheduleConfig, unsaved: Sequence[int], *, layer: int, cursor: int, k: int
) -> tuple[int, ...]:
    return tuple(sorted(_ranked(config, unsaved, layer=layer, cursor=cursor)[:k]))


def _filled(must: Sequence[int], ranked: Sequence[int], *, k: int) -> tuple[int, ...]:
    extra = [e for e in ranked if e not in must][: max(0, k - len(must))]
    return tuple(sorted([*must, *extra]))


def parts_saved(*, selected: bool, parts: str) -> tuple[str, ...]:
    """The parts of an expert that a checkpoint saves, given the configured ``parts``."""
    if selected or parts == "WO":
        return PARTS if selected else ()
    return (OPTIMIZER,) if parts == "W" else (WEIGHTS,)


def doubled_k(
    state: ScheduleState, config: ScheduleConfig, *, plt_of_present_k: float
) -> ScheduleState:
    """Dynamic-K: after a restore, double both K if the PLT they caused exceeds the budget.

    Args:
        state: The rotation's state.
        config: The schedule, with the PLT budget.
        plt_of_present_k: PLT of the losses since K last changed. The caller resets this sum to
            zero when the returned K differs.

    Source: MoC-System, Dynamic-K.
    """
    if plt_of_present_k <= config.plt_budget:
        return state
    return replace(
        state,
        k_snapshot=min(2 * state.k_snapshot, config.num_experts),
        k_persist=min(2 * state.k_persist, config.num_experts),
        doublings=state.doublings + 1,
    )


def rescheduled(
    state: ScheduleState,
    config: ScheduleConfig,
    *,
    k_snapshot: int = 0,
    snapshot_every: int = 0,
    persist_every: int = 0,
) -> ScheduleState:
    """The rotation with K and intervals (steps) from measured rates; 0 means as configured.

    Doublings by Dynamic-K are kept, since they depend on lost tokens and not on time.
    """
    factor = 1 << state.doublings
    k_persist = min(config.k_persist * factor, config.num_experts)
    wanted = max(k_snapshot or config.k_snapshot, k_persist)
    if state.doublings:
        wanted = max(wanted, config.k_snapshot * factor)
    return replace(
        state,
        k_persist=k_persist,
        k_snapshot=min(wanted, config.num_experts),
        snapshot_every=snapshot_every,
        persist_every=persist_every,
    )


def largest_hidden_k(*, bytes_of_k: Sequence[int], bytes_per_s: float, window_s: float) -> int:
    """The largest K whose copy is hidden behind forward and backward; at least 1.

    Args:
        bytes_of_k: Bytes that the busiest rank copies for each K to try, ascending.
        bytes_per_s: Measured rate of a rank's snapshot copy while the step runs.
        window_s: Time from the end of one optimizer step to the start of the next.

    Returns:
        The place in ``bytes_of_k``, counted from 1; this is K itself for K = 1, 2, ..., E.

    Source: MoC-System, adaptive configuration (O_save = max(0, T_snapshot - T_F&B)).
    """
    allowed = bytes_per_s * window_s * _USED_WINDOW
    return max(1, sum(amount <= allowed for amount in bytes_of_k))


def shortest_interval(
    *, bytes_of_busiest_writer: int, bytes_per_s: float, step_s: float, snapshot_every: int = 1
) -> int:
    """The shortest interval in steps at which a persist ends before the next one starts.

    The interval is a multiple of ``snapshot_every``.
    """
    busy_s = bytes_of_busiest_writer / bytes_per_s
    rounds = math.ceil(busy_s / (step_s * snapshot_every) - 1e-9)
    return max(1, rounds) * snapshot_every


def default_schedule(
    *,
    num_layers: int,
    num_experts: int,
    every: int,
    k_snapshot: int | None = None,
    k_persist: int | None = None,
    select: str = SEQUENTIAL,
    parts: str = "WO",
    plt_budget: float = 0.0375,
) -> ScheduleConfig:
    """Build the schedule from the user's settings; None means ``auto``.

    By default, every expert is persisted once in at most 16 checkpoints, and a snapshot holds four
    times as many experts as a checkpoint. Snapshots are frequent enough that each expert is
    snapshotted at least once between two checkpoints on storage, if ``every`` steps allow it.
    """
    persist = k_persist or max(1, math.ceil(num_experts / 16))
    snapshot = k_snapshot or min(num_experts, 4 * persist)
    if select == FULL:
        persist = snapshot = num_experts
    persist = min(persist, snapshot)
    rotation = math.ceil(num_experts / snapshot)
    wanted = max(1, every // rotation)
    return ScheduleConfig(
        num_layers=num_layers,
        num_experts=num_experts,
        select=select,
        k_snapshot=snapshot,
        k_persist=persist,
        snapshot_every=max(d for d in range(1, wanted + 1) if every % d == 0),
        persist_every=every,
        parts=parts,
        plt_budget=plt_budget,
    )
