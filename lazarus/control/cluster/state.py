"""What the controller knows: one frozen value, replaced at every event."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from lazarus.checkpoint.restoring.plt import PltLedger
from lazarus.checkpoint.restoring.policy import RecoveryDecider
from lazarus.checkpoint.restoring.restore_choice import StoredCheckpoint
from lazarus.checkpoint.selection.adaptive import Adapted, Measured, SaveSettings
from lazarus.config.timeouts import Timeouts, derive_timeouts
from lazarus.control.cluster.poison import Death, Gone
from lazarus.control.cluster.remembered import remembered
from lazarus.control.messages import (
    Aligned,
    Move,
    NodeNotice,
    NodesAwaited,
    Ready,
    Report,
    Restore,
    Seat,
    StorageProblem,
    Vector,
)
from lazarus.control.ports import Command, Stored
from placement import PlacementPolicy, Plan, replan
from placement.rebalance import Regret

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


class Phase(Enum):
    """Where the run stands."""

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
    """What of the configuration decisions depend on. Seconds and counts only."""

    steps: int
    run_id: str = ""
    global_batch: int = 32
    seed: int = 0
    faults: tuple[str, ...] = ()  # scripted; what of them never happens is said at the end
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
    plan_limit_s: float = 1.0  # of the integer program
    plans_by_zone: bool = False
    memory_fraction: float = 0.85  # of a node's memory that automatic slots may fill
    heal: str = "auto"
    version: str = ""
    placement: PlacementPolicy = replan
    recovery: RecoveryDecider | None = None  # None: on_lost_expert decides
    plan_text: Callable[[Plan], str] = Plan.to_json  # what Prepare carries
    resume: str | None = None  # checkpoint that this run started from
    start_step: int = 0
    start_generation: int = 0  # the first claim is above it
    start_plt: PltLedger = field(default_factory=PltLedger)  # what earlier lives lost
    start_plt_spent: float = 0.0
    start_lineage: tuple[tuple[int, int], ...] = ()
    checkpoint_url: str = ""
    rescue_url: str = ""  # another place for the last checkpoint; empty: there is none
    probes_place: bool = False  # every node tries the checkpoint place before it trains
    checkpoints: tuple[StoredCheckpoint, ...] = ()  # usable ones at the start
    stored: tuple[Stored, ...] = ()  # newest versions on storage at the start


def without(table: Mapping[_Key, _Value], keys: Collection[_Key]) -> Mapping[_Key, _Value]:
    """The table less some keys; itself where nothing goes."""
    if not keys:
        return table
    left = dict(table)
    for key in keys:
        left.pop(key, None)
    return left


@dataclass(frozen=True, kw_only=True, slots=True)
class Worker:
    """One rank's process, as its stream shows it."""

    node: int
    local_rank: int
    host: str
    keeper: str = ""
    connected: bool = True
    heard_s: float = 0.0
    progress: int = 0
    progress_s: float = 0.0
    waiting: bool = False
    step: int = 0
    undisturbed: bool = True  # said at hello that it computes in the newest generation, unfenced


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """One machine by its join-order number."""

    key: str
    workers: tuple[str, ...]  # by local rank; "" where the process has not said hello yet
    joined_s: float = 0.0
    leaving: str = ""  # cause, empty if it stays
    zone: str = ""  # what fails together with others; empty: not known
    memory_bytes: int = 0  # that experts may use; 0: not known

    @property
    def complete(self) -> bool:
        return "" not in self.workers


@dataclass(frozen=True, kw_only=True, slots=True)
class Save:
    """A checkpoint on its way: every seat of its generation owes a share (JSON)."""

    generation: int
    seats: tuple[str, ...]
    shares: Mapping[str, str] = field(default_factory=dict)
    failed: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Outvoted:
    """State that the majority of its holders contradicts, and that is not repaired yet."""

    workers: frozenset[str] = frozenset()  # whose dense state it is
    copies: frozenset[tuple[str, int, int]] = frozenset()  # (worker, layer, expert)

    def __bool__(self) -> bool:
        return bool(self.workers or self.copies)

    def less(self, known: Outvoted) -> Outvoted:
        """What is not known yet."""
        return Outvoted(workers=self.workers - known.workers, copies=self.copies - known.copies)


@dataclass(frozen=True, kw_only=True, slots=True)
class Transition:
    """One attempt to reach RESUME of one generation. A loss discards it whole."""

    generation: int
    voters: tuple[int, ...]  # nodes whose state counts
    joiners: tuple[int, ...]
    leavers: tuple[int, ...]
    phase_s: float  # when the current phase began
    reason: str = ""
    restarts: bool = False  # nobody is left: fresh nodes take all state from a checkpoint
    reports: Mapping[str, Report] = field(default_factory=dict)
    step: int = -1
    aligned: Mapping[str, Aligned] = field(default_factory=dict)
    plan: Plan | None = None
    seats: tuple[Seat, ...] = ()
    feeders: tuple[Seat, ...] = ()
    moves: tuple[Move, ...] = ()
    moves_behind: tuple[Move, ...] = ()
    restores: tuple[Restore, ...] = ()
    outvoted: frozenset[str] = frozenset()  # workers that take the dense state of the others
    goes_back: bool = False  # nobody knows whose dense state is right: back to a checkpoint
    is_tied: bool = False  # of the dense state or an expert, nobody has a majority
    rollback: bool = False
    refused: str = ""  # why the user's recovery policy did not decide what is restored
    awaits: bool = False  # a checkpoint in flight that the lost experts may come back from
    awaits_word: bool = False  # all are ready, but a death may show that the step is poisoned
    held_until_s: float = 0.0  # a recovery policy wants to be asked again then
    moved_bytes: int = 0
    ready: Mapping[str, Ready] = field(default_factory=dict)

    @property
    def next_nodes(self) -> tuple[int, ...]:
        stay = _less(self.voters, self.leavers) if self.leavers else self.voters
        return _together(stay, self.joiners) if self.joiners else stay


@remembered
def _less(voters: tuple[int, ...], leavers: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(set(voters) - set(leavers)))


@remembered
def _together(stay: tuple[int, ...], joiners: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted((*stay, *joiners)))  # nobody is both voter and joiner


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeline:
    """Seconds of one recovery, from the trigger to the next commit, over all its attempts."""

    reason: str
    trigger_s: float
    marks: Mapping[str, float] = field(default_factory=dict)
    moves: int = 0
    behind: int = 0  # replicas that are refilled after RESUME
    bytes_moved: int = 0
    lost: tuple[int, ...] = ()
    joined: tuple[int, ...] = ()
    attempts: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Control:
    """The controller's whole state."""

    config: ControlConfig
    term: int = 1
    phase: Phase = Phase.GATHERING
    generation: int = 0  # newest claimed
    resumed: int = 0  # newest RESUMEd
    step: int = 0  # newest journaled commit
    started_s: float = 0.0
    phase_s: float = 0.0
    next_serial: int = 0
    nodes: Mapping[int, Node] = field(default_factory=dict)
    notices: Mapping[str, NodeNotice] = field(default_factory=dict)  # of nodes not heard of yet
    workers: Mapping[str, Worker] = field(default_factory=dict)
    members: tuple[int, ...] = ()  # living nodes of the newest RESUMEd generation
    seats: tuple[str, ...] = ()  # its ranks' workers in rank order, the dead ones too
    seat_nodes: tuple[int, ...] = ()  # the node of each
    transition: Transition | None = None
    plan: Plan | None = None  # of the newest RESUMEd generation
    base_plan: Plan | None = None  # of the last committed step (rule 22)
    lineage: tuple[tuple[int, int], ...] = ()
    rolled: tuple[int, int] = (0, 0)  # generation and step of the last RESUME that rolled back
    known: Mapping[int, Vector] = field(default_factory=dict)  # decided, not yet published
    newest: Vector | None = None  # of the newest journaled commit: a member may still lack it
    flushed_s: float = 0.0
    shape: tuple[int, int] = (0, 0)  # MoE layers, experts
    record_bytes: tuple[int, int] = (0, 0)  # dense state, one expert's record
    speeds: Mapping[int, float] = field(default_factory=dict)  # node -> share weight in force
    next_speeds: Mapping[int, float] = field(default_factory=dict)  # from the next RESUME on
    pace: Mapping[int, float] = field(default_factory=dict)  # node -> seconds per sample, smoothed
    streaks: Mapping[int, int] = field(default_factory=dict)  # node -> steps it was out of pace
    step_s: float = 0.0  # of the last committed step
    history: NDArray[np.float64] = field(  # load history at `step`, [3, L, E]; never written to
        default_factory=lambda: np.zeros((3, 0, 0), dtype=np.float64)
    )
    regret: Regret = field(default_factory=Regret)
    looked: int = 0  # step of the last look at the plan
    wants: str = ""  # reason for which a pause is wanted
    whole_asked: int = 0  # pauses for a full checkpoint since one was persisted
    whole_again_s: float = 0.0  # the next such pause comes no earlier
    paused: Mapping[str, int] = field(default_factory=dict)
    paused_s: float = 0.0  # when the last of them was
    pause_sent: bool = False
    suspicion_s: float | None = None
    complaints: tuple[int, ...] = ()  # nodes whose collectives failed in this generation, in order
    errors: tuple[tuple[int, ...], ...] = ()  # first complaints of generations without a commit
    fired: Mapping[int, float] = field(default_factory=dict)  # node -> time of its injected fault
    struck: frozenset[tuple[str, int]] = frozenset()  # (worker, number) of the faults on record
    fired_specs: frozenset[str] = frozenset()  # the scripted faults among them
    doomed: frozenset[int] = frozenset()  # nodes that were told to raise
    deaths: tuple[Death, ...] = ()  # in functions of the user's, of steps not yet committed
    unexplained: tuple[Gone, ...] = ()  # lost members whose launcher has not told how they ended
    excused: frozenset[str] = frozenset()  # keys of lost nodes that had been struck on purpose
    hung: frozenset[str] = frozenset()  # keys of nodes that were lost because a thread stood still
    raised: tuple[tuple[int, int], ...] = ()  # (node, step) of errors of our own
    timeline: Timeline | None = None
    stopping: str = ""  # reason, empty while the run shall go on
    preempted: bool = False  # the machine wants to stop, not the user
    finalized: Mapping[str, Any] = field(default_factory=dict)
    finalized_s: float = 0.0  # when the last of them was
    digests: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    digest: str = ""
    hold_reason: str = ""
    tried: tuple[int, ...] = ()  # nodes that did not suffice for a generation
    broken: bool = False  # an invariant failed: never resume by itself
    outvoted: Outvoted = field(default_factory=Outvoted)
    outvotes: Mapping[int, tuple[int, ...]] = field(default_factory=dict)  # node -> steps
    suspects: tuple[tuple[int, int], ...] = ()  # (node, step) of those evicted for it
    ties: tuple[int, ...] = ()  # steps at which state differed without a majority
    undecided: bool = False  # a comparison without a majority waits for a change of members
    stale: int = 0  # messages of older generations, dropped
    awaited: NodesAwaited | None = None  # what the driver last said of nodes that are not there
    awaited_told: int = 0  # the most of them that the record names, since all were there
    idle_s: float | None = None  # since when none of them is coming up; None: some are, or unknown
    num_refused: int = 0  # messages that say what cannot be, dropped
    dropped: Mapping[str, tuple[str, str]] = field(  # worker -> its last of them, and why
        default_factory=dict
    )
    top_k: int = 1
    num_samples: int = 0  # of the data; 0: numbered without end; -1: a stream of shards
    evaluated: int = 0  # step of the last evaluation that was published
    saves: Mapping[int, Save] = field(default_factory=dict)  # by step
    past_seats: Mapping[int, tuple[str, ...]] = field(default_factory=dict)  # by generation
    ordered: int = 0  # newest step whose manifest was ordered
    writing: tuple[int, ...] = ()  # steps of manifests that are being written
    bad_sources: frozenset[str] = frozenset()  # copies that could not be read: never chosen again
    refused: frozenset[str] = frozenset()  # those of them that storage did not give at all
    refusal: tuple[str, str, str] = ("", "", "")  # its last: URL, operation, what it said
    readable: Mapping[tuple[int, int], int] = field(  # newest stored step that all ranks can read
        default_factory=dict
    )
    gone_s: float | None = None  # since when everybody is gone; None: there was a commit since
    checkpoints: tuple[StoredCheckpoint, ...] = ()
    stored: tuple[Stored, ...] = ()
    plt: PltLedger = field(default_factory=PltLedger)
    plt_spent: float = 0.0  # when K was last doubled
    doubling: bool = False  # the newest RESUME told the ranks to double K
    manifest_pending: bool = False  # the final one
    final_url: str = ""  # where the last checkpoint is written now; empty: where it belongs
    final_problem: StorageProblem | None = None  # why it is not there
    final_bytes: int = 0  # room that it needs
    measured: Mapping[str, Measured] = field(default_factory=dict)  # by worker
    adapted: Adapted | None = None  # schedule of saves from measured rates; None: as configured

    @property
    def routed(self) -> NDArray[np.int64]:
        """Cumulative routed copies [L, E] at ``step``."""
        counts: NDArray[np.int64] = self.history[1].astype(np.int64)
        return counts


# What is decided on an event: the next state, and what the shell must do to get there.
Decision = tuple[Control, tuple[Command, ...]]
