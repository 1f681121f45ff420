"""The controller's state: frozen dataclasses, replaced as a whole at every event.

``Control`` says where the run is; what it knows of each subject is in a part (``control/parts/``).
An event replaces the parts that it changes: ``replace(state, part=replace(state.part, ...))``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import Any, TypeVar, cast

from lazarus.checkpoint.restoring.plt import PltLedger
from lazarus.checkpoint.restoring.policy import RecoveryDecider
from lazarus.checkpoint.restoring.restore_choice import StoredCheckpoint
from lazarus.checkpoint.selection.adaptive import SaveSettings
from lazarus.config.timeouts import Timeouts, derive_timeouts
from lazarus.control.cluster.transition import Timeline, Transition
from lazarus.control.parts.agreement import Agreement
from lazarus.control.parts.blame import Blame
from lazarus.control.parts.committed import Committed
from lazarus.control.parts.ending import Ending
from lazarus.control.parts.injected import InjectedFaults
from lazarus.control.parts.pausing import Pausing
from lazarus.control.parts.rejected import Rejected
from lazarus.control.parts.roster import Roster
from lazarus.control.parts.saving import Saving
from lazarus.control.parts.standing import Standing
from lazarus.control.parts.storage import Storage
from lazarus.control.parts.tuning import Tuning
from lazarus.control.parts.waiting import Waiting
from lazarus.control.ports import Command, Stored
from placement import PlacementPolicy, Plan, replan

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


class Phase(Enum):
    """The phase of the run; the controller is in exactly one at a time."""

    GATHERING = "gathering"  # waiting for the first nodes
    RUNNING = "running"
    FENCING = "fencing"  # generation claimed, reports awaited
    ALIGNING = "aligning"  # verdict given, applies awaited
    PREPARING = "preparing"  # groups and transfers
    RECONNECTING = "reconnecting"  # after the controller's own death
    HOLDING = "holding"  # too few nodes: the state is kept in memory
    FINALIZING = "finalizing"  # last digest and checkpoint
    ENDED = "ended"


TRANSITION_PHASES = frozenset({Phase.FENCING, Phase.ALIGNING, Phase.PREPARING})


@dataclass(frozen=True, kw_only=True, slots=True)
class ControlConfig:
    """The part of the run's configuration that the controller's decisions depend on."""

    steps: int
    run_id: str = ""
    global_batch: int = 32
    seed: int = 0
    faults: tuple[str, ...] = ()  # scripted; those that never fired are reported at the end
    ledger: bool = False  # record the sample ids of each committed step
    nodes: int = 4
    min_nodes: int = 1
    max_nodes: int | None = None
    ranks_per_node: int = 1
    min_replicas: int = 2
    slots_per_node: int | None = None  # None: enough for min_replicas after spare_losses losses
    spare_losses: int = 2
    timeouts: Timeouts = field(default_factory=lambda: derive_timeouts(10.0))
    join_debounce_s: float = 2.0
    quorum_timeout_s: float = 3600.0
    final_checkpoint: bool = True
    on_lost_expert: str = "partial"
    on_mismatch: str = "repair"
    partial_checkpoints: bool = True  # a checkpoint may point to files of older ones
    saves: SaveSettings = field(default_factory=SaveSettings)
    plt_budget: float = 0.0375
    resilience_weight: float = 1.0
    solver: str = "auto"  # only "ilp" differs, and only in the first plan
    plan_limit_s: float = 1.0  # time limit of the integer program
    plans_by_zone: bool = False
    memory_fraction: float = 0.85  # part of a node's memory that automatic slots may fill
    heal: str = "auto"
    version: str = ""
    placement: PlacementPolicy = replan
    recovery: RecoveryDecider | None = None  # None: on_lost_expert decides
    plan_text: Callable[[Plan], str] = Plan.to_json  # how Prepare encodes the plan
    resume: str | None = None  # checkpoint that this run started from
    start_step: int = 0
    start_generation: int = 0  # the first claim is a higher generation
    start_plt: PltLedger = field(default_factory=PltLedger)  # tokens lost before this start
    start_plt_spent: float = 0.0
    start_lineage: tuple[tuple[int, int], ...] = ()
    checkpoint_url: str = ""
    rescue_url: str = ""  # where the last checkpoint goes if checkpoint_url fails; empty: none
    probes_place: bool = False  # each node tests checkpoint_url before training
    checkpoints: tuple[StoredCheckpoint, ...] = ()  # usable ones at the start
    stored: tuple[Stored, ...] = ()  # newest versions on storage at the start


def without(table: Mapping[_Key, _Value], keys: Collection[_Key]) -> Mapping[_Key, _Value]:
    """A copy of the table without the given keys; the table itself if there are no keys."""
    if not keys:
        return table
    left = dict(table)
    for key in keys:
        left.pop(key, None)
    return left


@dataclass(frozen=True, kw_only=True, slots=True)
class Control:
    """The controller's whole state: where the run is, and one part for each subject.

    Times (``_s``) are seconds on the clock of the events, unless a comment says otherwise.
    """

    config: ControlConfig
    term: int = 1
    phase: Phase = Phase.GATHERING
    phase_s: float = 0.0
    started_s: float = 0.0
    generation: int = 0  # newest claimed
    resumed: int = 0  # newest RESUMEd
    step: int = 0  # newest journaled commit
    transition: Transition | None = None
    timeline: Timeline | None = None
    roster: Roster = field(default_factory=Roster)
    standing: Standing = field(default_factory=Standing)
    committed: Committed = field(default_factory=Committed)
    tuning: Tuning = field(default_factory=Tuning)
    pausing: Pausing = field(default_factory=Pausing)
    waiting: Waiting = field(default_factory=Waiting)
    rejected: Rejected = field(default_factory=Rejected)
    blame: Blame = field(default_factory=Blame)
    injected: InjectedFaults = field(default_factory=InjectedFaults)
    agreement: Agreement = field(default_factory=Agreement)
    saving: Saving = field(default_factory=Saving)
    storage: Storage = field(default_factory=Storage)
    ending: Ending = field(default_factory=Ending)


PARTS: Mapping[str, tuple[str, ...]] = {  # part -> names of its fields
    part.name: tuple(inner.name for inner in fields(cast(Any, part.default_factory)))
    for part in fields(Control)
    if isinstance(part.default_factory, type)
}
_PART_OF = {name: part for part, names in PARTS.items() for name in names}


def fields_of(state: Control) -> dict[str, Any]:
    """All fields of the state by name, those of its parts in place of the parts."""
    found: dict[str, Any] = {}
    for item in fields(Control):
        value = getattr(state, item.name)
        if item.name in PARTS:
            found.update((name, getattr(value, name)) for name in PARTS[item.name])
        else:
            found[item.name] = value
    return found


def with_fields(state: Control, changes: Mapping[str, Any]) -> Control:
    """A copy of the state with new values of fields, which are named as in ``fields_of``."""
    own: dict[str, Any] = {}
    inner: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        if name in _PART_OF:
            inner.setdefault(_PART_OF[name], {})[name] = value
        else:
            own[name] = value
    own.update((part, replace(getattr(state, part), **new)) for part, new in inner.items())
    return replace(state, **own)


def attempt_in(state: Control, phase: Phase, *, generation: int) -> Transition | None:
    """The reconfiguration under way if it is in ``phase`` and of ``generation``, else None."""
    attempt = state.transition
    if state.phase is not phase or attempt is None or attempt.generation != generation:
        return None
    return attempt


def one_more_stale(state: Control) -> Control:
    """The state after one more message of an older generation, which is only counted."""
    return replace(state, rejected=replace(state.rejected, stale=state.rejected.stale + 1))


# The answer to an event: the next state, and the commands that the shell carries out in order.
Decision = tuple[Control, tuple[Command, ...]]
