"""The controller's state: frozen dataclasses, replaced as a whole at every event."""

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
class Worker:
    """One worker process (one rank), as its messages describe it."""

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
    undisturbed: bool = True  # at hello it was computing in the newest generation, unfenced


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """One machine; its serial, the key in ``Control.nodes``, is its number in join order."""

    key: str
    workers: tuple[str, ...]  # by local rank; "" where the process has not said hello yet
    joined_s: float = 0.0
    leaving: str = ""  # cause; empty: the node stays
    zone: str = ""  # failure domain; empty: not known
    memory_bytes: int = 0  # available to experts; 0: not known

    @property
    def complete(self) -> bool:
        """Whether all processes of the node have said hello."""
        return "" not in self.workers


@dataclass(frozen=True, kw_only=True, slots=True)
class Save:
    """A checkpoint being written: each worker of its generation must report its share (JSON)."""

    generation: int
    seats: tuple[str, ...]
    shares: Mapping[str, str] = field(default_factory=dict)
    failed: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Outvoted:
    """State that differs from that of the majority of ranks and is not repaired yet."""

    workers: frozenset[str] = frozenset()  # whose dense state differs
    copies: frozenset[tuple[str, int, int]] = frozenset()  # (worker, layer, expert)

    def __bool__(self) -> bool:
        return bool(self.workers or self.copies)

    def less(self, known: Outvoted) -> Outvoted:
        """The part of this evidence that ``known`` does not contain."""
        return Outvoted(workers=self.workers - known.workers, copies=self.copies - known.copies)


@dataclass(frozen=True, kw_only=True, slots=True)
class Transition:
    """One attempt to reach the RESUME of a generation; the loss of a node in it discards it."""

    generation: int
    voters: tuple[int, ...]  # nodes whose state counts
    joiners: tuple[int, ...]
    leavers: tuple[int, ...]
    phase_s: float  # when the current phase began
    reason: str = ""
    restarts: bool = False  # no member is left: new nodes take all state from a checkpoint
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
    goes_back: bool = False  # the dense state differs without a majority: back to a checkpoint
    is_tied: bool = False  # the dense state or an expert differs without a majority
    rollback: bool = False
    refused: str = ""  # why the user's recovery policy was not followed
    awaits: bool = False  # waits for a checkpoint that may restore the lost experts
    awaits_word: bool = False  # all are ready, but a launcher's report may show a poisoned step
    held_until_s: float = 0.0  # when to ask the recovery policy again; 0: it does not hold
    moved_bytes: int = 0
    ready: Mapping[str, Ready] = field(default_factory=dict)

    @property
    def next_nodes(self) -> tuple[int, ...]:
        """Members after this transition: voters and joiners without leavers, ascending."""
        stay = _less(self.voters, self.leavers) if self.leavers else self.voters
        return _together(stay, self.joiners) if self.joiners else stay


@remembered
def _less(voters: tuple[int, ...], leavers: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(set(voters) - set(leavers)))


@remembered
def _together(stay: tuple[int, ...], joiners: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted((*stay, *joiners)))  # no node is both voter and joiner


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeline:
    """Seconds of one recovery, from the trigger to the next commit, over all its attempts."""

    reason: str
    trigger_s: float
    marks: Mapping[str, float] = field(default_factory=dict)
    moves: int = 0
    behind: int = 0  # replicas that are transferred after RESUME
    bytes_moved: int = 0
    lost: tuple[int, ...] = ()
    joined: tuple[int, ...] = ()
    attempts: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Control:
    """The controller's whole state.

    Times (``_s``) are seconds on the clock of the events, unless a comment says otherwise.
    """

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
    notices: Mapping[str, NodeNotice] = field(default_factory=dict)  # by key, of unknown nodes
    workers: Mapping[str, Worker] = field(default_factory=dict)
    members: tuple[int, ...] = ()  # living nodes of the newest RESUMEd generation
    seats: tuple[str, ...] = ()  # workers of that generation in rank order, dead ones included
    seat_nodes: tuple[int, ...] = ()  # the node of each seat
    transition: Transition | None = None
    plan: Plan | None = None  # of the newest RESUMEd generation
    base_plan: Plan | None = None  # of the last committed step (rule 22)
    lineage: tuple[tuple[int, int], ...] = ()
    rolled: tuple[int, int] = (0, 0)  # generation and step of the last RESUME that rolled back
    known: Mapping[int, Vector] = field(default_factory=dict)  # decided, not yet published
    newest: Vector | None = None  # vector of the newest journaled commit; members may lack it
    flushed_s: float = 0.0
    shape: tuple[int, int] = (0, 0)  # MoE layers, experts
    record_bytes: tuple[int, int] = (0, 0)  # dense state, one expert's image
    speeds: Mapping[int, float] = field(default_factory=dict)  # node -> share weight in force
    next_speeds: Mapping[int, float] = field(default_factory=dict)  # from the next RESUME on
    pace: Mapping[int, float] = field(default_factory=dict)  # node -> seconds per sample, smoothed
    streaks: Mapping[int, int] = field(default_factory=dict)  # node -> steps out of pace in a row
    step_s: float = 0.0  # duration of the last committed step
    history: NDArray[np.float64] = field(  # load history at `step`, [3, L, E]; never written to
        default_factory=lambda: np.zeros((3, 0, 0), dtype=np.float64)
    )
    regret: Regret = field(default_factory=Regret)
    looked: int = 0  # step at which rebalancing was last considered
    wants: str = ""  # why all ranks should pause; empty: no pause is wanted
    whole_asked: int = 0  # pauses for a full checkpoint since the last persisted one
    whole_again_s: float = 0.0  # no further such pause before this time
    paused: Mapping[str, int] = field(default_factory=dict)
    paused_s: float = 0.0  # when the last rank paused
    pause_sent: bool = False
    suspicion_s: float | None = None
    complaints: tuple[int, ...] = ()  # nodes whose collectives failed in this generation, in order
    errors: tuple[tuple[int, ...], ...] = ()  # first complaints of generations without a commit
    fired: Mapping[int, float] = field(default_factory=dict)  # node -> time of its injected fault
    struck: frozenset[tuple[str, int]] = frozenset()  # (worker, number) of the faults on record
    fired_specs: frozenset[str] = frozenset()  # specs of the scripted faults among them
    doomed: frozenset[int] = frozenset()  # nodes that got an injected crash
    deaths: tuple[Death, ...] = ()  # inside user functions, at steps not yet committed
    unexplained: tuple[Gone, ...] = ()  # lost members; the launcher has not reported how they ended
    excused: frozenset[str] = frozenset()  # keys of lost nodes whose deaths never count
    hung: frozenset[str] = frozenset()  # keys of nodes lost because a thread made no progress
    raised: tuple[tuple[int, int], ...] = ()  # (node, step) of errors of Lazarus itself
    timeline: Timeline | None = None
    stopping: str = ""  # reason to stop; empty: the run goes on
    preempted: bool = False  # the stop comes from the machine, not the user
    finalized: Mapping[str, Any] = field(default_factory=dict)
    finalized_s: float = 0.0  # when the last rank finalized
    digests: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    digest: str = ""
    hold_reason: str = ""
    tried: tuple[int, ...] = ()  # nodes with which the last attempt had to hold
    broken: bool = False  # an invariant failed: the run never resumes by itself
    outvoted: Outvoted = field(default_factory=Outvoted)
    outvotes: Mapping[int, tuple[int, ...]] = field(default_factory=dict)  # node -> steps
    suspects: tuple[tuple[int, int], ...] = ()  # (node, step) of nodes evicted for being outvoted
    ties: tuple[int, ...] = ()  # steps at which state differed without a majority
    undecided: bool = False  # replicas differ without a majority: a fence is due
    stale: int = 0  # messages of older generations, dropped
    awaited: NodesAwaited | None = None  # the driver's last report on missing nodes
    awaited_told: int = 0  # the highest number on record since none was missing
    idle_s: float | None = None  # since when no missing node is being started; None: some are
    num_refused: int = 0  # malformed messages, dropped
    dropped: Mapping[str, tuple[str, str]] = field(  # worker -> its last malformed message, and why
        default_factory=dict
    )
    top_k: int = 1
    num_samples: int = 0  # size of the data; 0: endless numbering; -1: a stream of shards
    evaluated: int = 0  # step of the last evaluation that was published
    saves: Mapping[int, Save] = field(default_factory=dict)  # by step
    past_seats: Mapping[int, tuple[str, ...]] = field(default_factory=dict)  # by generation
    ordered: int = 0  # newest step whose manifest was ordered
    writing: tuple[int, ...] = ()  # steps of manifests that are being written
    bad_sources: frozenset[str] = frozenset()  # copies that could not be read: never chosen again
    refused: frozenset[str] = frozenset()  # those among them that storage refused to read
    refusal: tuple[str, str, str] = ("", "", "")  # the last such refusal: URL, operation, message
    readable: Mapping[tuple[int, int], int] = field(  # newest stored step that all ranks can read
        default_factory=dict
    )
    gone_s: float | None = None  # since when all members are lost; None: committed since
    checkpoints: tuple[StoredCheckpoint, ...] = ()
    stored: tuple[Stored, ...] = ()
    plt: PltLedger = field(default_factory=PltLedger)
    plt_spent: float = 0.0  # PLT when K was last doubled
    doubling: bool = False  # the newest RESUME told the ranks to double K
    manifest_pending: bool = False  # the final manifest is being written
    final_url: str = ""  # where the last checkpoint is written; empty: at checkpoint_url
    final_problem: StorageProblem | None = None  # why checkpoint_url was not written
    final_bytes: int = 0  # size of the last checkpoint
    measured: Mapping[str, Measured] = field(default_factory=dict)  # by worker
    adapted: Adapted | None = None  # schedule of saves from measured rates; None: as configured

    @property
    def routed(self) -> NDArray[np.int64]:
        """Cumulative routed copies [L, E] at ``step``."""
        counts: NDArray[np.int64] = self.history[1].astype(np.int64)
        return counts


# The answer to an event: the next state, and the commands that the shell carries out in order.
Decision = tuple[Control, tuple[Command, ...]]
