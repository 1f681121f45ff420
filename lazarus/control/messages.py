"""The messages between the controller, its workers and the driver, as frozen structs.

``runtime/rpc/codec.py`` encodes these classes as msgpack, field by field. A reader refuses a value
of the wrong type and ignores a field that is not declared here. The module does not depend on
streams, clocks or processes. It is longer than other files because it is nothing but declarations,
one for each message, which are read side by side.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from lazarus.errors import StorageError
from lazarus.failure import Cause, Failure, Status

Int = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]  # what fits in 64 bits


class Body(Struct, frozen=True, kw_only=True, tag=True):
    """Base of all messages; type and field names are part of the encoding."""


class Part(Struct, frozen=True, kw_only=True, array_like=True):
    """Base of repeated pieces of a message, encoded as arrays without field names.

    Append new fields at the end, with a default.
    """


# ---- worker -> controller --------------------------------------------------------------------


class Hello(Body, frozen=True, kw_only=True):
    """A worker opens its stream: the first time, or again after the controller came back.

    ``generation``, ``fence`` and ``committed`` are the worker's generation, fence and newest
    committed step. ``zone`` is the failure domain of its node, ``memory_bytes`` the memory that
    experts may use there; empty or 0 if not known.
    """

    worker: str
    node_key: str
    local_rank: Int = 0
    ranks_per_node: Int = 1
    host: str = "127.0.0.1"
    pid: Int = 0
    version: str = ""
    term: Int = 0
    generation: Int = 0
    fence: Int = 0
    committed: Int = 0
    keeper: str = ""
    zone: str = ""
    memory_bytes: Int = 0


class Heartbeat(Body, frozen=True, kw_only=True):
    """Sign of life of a worker, with the progress of its training thread."""

    generation: Int
    step: Int
    phase: str = ""
    progress: Int = 0
    waiting: bool = False
    step_s: float = 0.0
    acked: Int = 0


class Vector(Body, frozen=True, kw_only=True):
    """The summed commit vector of one step; ``lanes`` is float64, little endian."""

    generation: Int
    step: Int
    lanes: bytes
    wall_s: float = 0.0
    at_s: float = 0.0  # when the controller received the vector; set by the controller


class Suspicion(Body, frozen=True, kw_only=True):
    """A collective failed, or a copy to restore from cannot be read (rule 16)."""

    generation: Int
    step: Int
    phase: str = ""
    error: str = ""
    bad_source: str = ""  # name of a copy that cannot be used
    storage_url: str = ""  # URL that storage refused; empty: the copy was read
    operation: str = ""  # operation that storage refused
    store: bool = False  # the rendezvous store did not answer: no node is to blame


class Tail(Part, frozen=True, kw_only=True):
    """The newest exchanges of a rank and its place in user code, to explain why all ranks wait."""

    group: str = ""
    last: Int = -1  # number of the newest exchange
    labels: tuple[str, ...] = ()  # of the newest exchanges, up to ``last``
    rank: Int = -1  # in the group
    step: Int = -1
    place: str = ""  # line of user code that the training thread is in
    mute: tuple[Int, ...] = ()  # ranks to which a link carries nothing
    places: tuple[str, ...] = ()  # for each label, the line of user code that led to it


class Report(Body, frozen=True, kw_only=True):
    """Answer to FENCE: the steps at which the rank has stopped (rule 18)."""

    generation: Int
    committed: Int
    prepared: Int
    vectors: tuple[Vector, ...] = ()
    entered: Int = 0  # generation of the last RESUME that the rank carried out
    tail: Tail = Tail()


class Held(Part, frozen=True, kw_only=True):
    """Experts of one layer whose live copy this rank holds at the aligned step."""

    layer: Int
    experts: tuple[Int, ...]
    sums: tuple[Int, ...] = ()  # checksum of each expert; 0 or no entry: not computed


class SnapshotHeld(Part, frozen=True, kw_only=True):
    """A snapshot of one expert, in host memory of the rank's node or as read from storage."""

    layer: Int
    expert: Int
    generation: Int
    step: Int
    routed: Int = 0  # the expert's cumulative routed copies at that step
    num_bytes: Int = 0


class TensorSum(Part, frozen=True, kw_only=True):
    """One tensor of the dense state as a rank has built it."""

    name: str
    kind: str  # element type and shape
    sum: Int  # checksum of its bytes


class Aligned(Body, frozen=True, kw_only=True):
    """Answer to ALIGN: the rank is at ``step``; ``history`` is float64 [3, L, E], little endian."""

    generation: Int
    step: Int
    dense_digest: str = ""
    history_digest: str = ""
    history: bytes = b""
    held: tuple[Held, ...] = ()
    scalars: str = ""
    dense_bytes: Int = 0
    expert_bytes: Int = 0
    num_layers: Int = 0
    num_experts: Int = 0
    top_k: Int = 0
    snapshots: tuple[SnapshotHeld, ...] = ()
    tensors: tuple[TensorSum, ...] = ()  # only before a rank's first step
    place: str = ""  # where the user's model builder is defined; set together with tensors
    settings_digest: str = ""  # of the optimizer's settings, which must be equal on all ranks


class StorageProblem(Part, frozen=True, kw_only=True):
    """An operation that a disk or object store refused."""

    url: str
    operation: str
    reason: str
    is_full: bool = False


def problem_of(error: StorageError) -> StorageProblem:
    """The wire form of a StorageError."""
    return StorageProblem(
        url=error.url, operation=error.operation, reason=error.reason, is_full=error.is_full
    )


class Ready(Body, frozen=True, kw_only=True):
    """Answer to PREPARE: groups are built, digests compared, all staged copies verified."""

    generation: Int
    plan_digest: str
    groups_s: float = 0.0
    transfer_s: float = 0.0
    bytes_received: Int = 0
    restored: tuple[SnapshotHeld, ...] = ()  # versions really read from storage
    history: bytes = b""  # load history, where all state came from a checkpoint
    place: StorageProblem | None = None  # the checkpoint place cannot be used from this node


class Paused(Body, frozen=True, kw_only=True):
    """The rank has paused after ``step`` (rule 15), or has finished the last step."""

    generation: Int
    step: Int


class LeaveRequest(Body, frozen=True, kw_only=True):
    """The node will leave; its machine stays for at least ``notice_s`` seconds."""

    generation: Int
    notice_s: float = 0.0
    cause: str = ""


class FaultFired(Body, frozen=True, kw_only=True):
    """An injected fault is about to happen on this worker, once the controller says Go."""

    generation: Int
    step: Int
    kind: str
    phase: str = ""
    spec: str = ""
    count: Int = 1  # nodes that a "join" fault adds
    number: Int = 0  # number of this fault on the worker, the same if sent again


class DigestItem(Part, frozen=True, kw_only=True):
    """SHA-256 of one named item of the state."""

    name: str
    sha256: bytes


class DigestPart(Body, frozen=True, kw_only=True):
    """The rank's part of the state digest; each item is reported by exactly one rank."""

    generation: Int
    step: Int
    items: tuple[DigestItem, ...] = ()


class Finalized(Body, frozen=True, kw_only=True):
    """The rank has written its share of the last checkpoint (``files`` is JSON), or failed to."""

    generation: Int
    step: Int
    files: str = ""
    wall_s: float = 0.0
    url: str = ""  # target, as in ``Finalize``
    num_bytes: Int = 0  # size of the share
    problem: StorageProblem | None = None


class UserError(Body, frozen=True, kw_only=True):
    """A rank cannot go on: user code raised, or Lazarus itself did; see ``cause``.

    ``place`` is the line of user code, ``shown`` the shortened traceback for messages, and
    ``traceback`` the full one.
    """

    generation: Int
    step: Int
    error: str = ""
    traceback: str = ""
    cause: Cause = Cause.USER_CODE
    rank: Int = -1
    phase: str = ""
    sample_ids: tuple[Int, ...] = ()
    place: str = ""
    shown: str = ""
    on_purpose: bool = False  # an injected crash
    url: str = ""  # of the storage that failed, if storage is the cause
    operation: str = ""


class ShareReported(Body, frozen=True, kw_only=True):
    """A snapshot or persist on this node ended; ``record`` is JSON with its outcome."""

    generation: Int
    step: Int
    record: str = ""


class ReplicaMismatch(Body, frozen=True, kw_only=True):
    """The comparison during training found replicas that differ; ``what`` is JSON."""

    generation: Int
    step: Int
    what: str = ""


class Repaired(Body, frozen=True, kw_only=True):
    """Replicas that the comparison during training outvoted are repaired on ``ranks``."""

    generation: Int
    step: Int
    layer: Int = -1  # layer and expert are -1 for the dense state
    expert: Int = -1
    ranks: tuple[Int, ...] = ()


class Evaluated(Body, frozen=True, kw_only=True):
    """Held-out loss after ``step``: sum over all ranks, and ``count``, the number of summands."""

    generation: Int
    step: Int
    loss_sum: float = 0.0
    count: float = 0.0


class Healed(Body, frozen=True, kw_only=True):
    """Background healing is complete; sent by rank 0."""

    generation: Int
    step: Int
    bytes_received: Int = 0
    pending: Int = 0


class Stacks(Body, frozen=True, kw_only=True):
    """Answer to AskStacks: the Python stacks as text."""

    text: str = ""


# ---- controller -> worker --------------------------------------------------------------------


class Welcome(Body, frozen=True, kw_only=True):
    """Answer to Hello: the worker is admitted, and its node has serial ``node``."""

    node: Int


class Fence(Body, frozen=True, kw_only=True):
    """Order to stop work of older generations and answer with Report."""

    generation: Int


class Align(Body, frozen=True, kw_only=True):
    """Order to move to the committed step ``step``, and to answer with Aligned.

    With ``commit``, a rank that is one step behind applies the commit vector ``lanes``. With
    ``reload`` ("url step", or "init") the rank replaces its own state by the checkpoint's.
    """

    generation: Int
    step: Int
    commit: bool = False
    lanes: bytes = b""
    reload: str = ""


class Seat(Part, frozen=True, kw_only=True):
    """The worker, node and addresses behind one rank of a group."""

    worker: str
    node: Int
    host: str = "127.0.0.1"
    keeper: str = ""


class Move(Part, frozen=True, kw_only=True):
    """Transfer of one expert's image; ``source`` and ``target`` are feeder indices."""

    layer: Int
    expert: Int
    source: Int
    target: Int


class Restore(Part, frozen=True, kw_only=True):
    """Restore of all replicas of one lost expert from the same chosen copy (rule 27)."""

    layer: Int
    expert: Int
    source: str
    generation: Int
    step: Int
    detail: str = ""


class Prepare(Body, frozen=True, kw_only=True):
    """Order to build the groups of ``generation``, transfer state into staging, and answer Ready.

    ``seats`` are the training ranks in rank order. ``feeders`` are the members of the transfer
    group: the seats, then the ranks of leaving nodes, which still send state. ``speeds`` are the
    weights of the ranks' sample shares; empty if all are equal.
    """

    generation: Int
    step: Int
    seats: tuple[Seat, ...]
    feeders: tuple[Seat, ...]
    plan: str
    moves: tuple[Move, ...] = ()
    moves_behind: tuple[Move, ...] = ()
    dense_sources: tuple[Int, ...] = ()
    dense_targets: tuple[Int, ...] = ()
    store: str = ""
    scalars: str = ""
    history: bytes = b""
    restores: tuple[Restore, ...] = ()
    speeds: tuple[float, ...] = ()
    lineage: str = "[]"
    reload: str = ""  # "url step": first read dense state and history from there
    probe: bool = False  # write to the checkpoint place, and read what the other nodes wrote


class Resume(Body, frozen=True, kw_only=True):
    """Order to train from committed step ``step`` on, in ``generation``."""

    generation: Int
    step: Int
    plan_digest: str = ""
    lineage: str = "[]"
    double_k: bool = False  # PLT budget is spent: save twice as many experts
    save_all: bool = False  # no checkpoint stands: the next one holds every expert
    k_snapshot: Int = 0  # measured schedule of saves; 0: as configured
    snapshot_every: Int = 0
    persist_every: Int = 0
    halt: bool = False  # the run is stopping: pause before the next step


class Pause(Body, frozen=True, kw_only=True):
    """Order to set the pause lane in the worker's next contribution to a commit vector."""

    generation: Int


class Ack(Body, frozen=True, kw_only=True):
    """Commits up to ``step`` are journaled; their vectors may be forgotten."""

    step: Int


class Go(Body, frozen=True, kw_only=True):
    """Answer to FaultFired: the fault is on record and may happen now."""

    spec: str
    is_done: bool = False  # another rank has already fired the fault: do nothing


class InjectFault(Body, frozen=True, kw_only=True):
    """Order to carry out a random fault that only the process itself can cause."""

    kind: str


class Finalize(Body, frozen=True, kw_only=True):
    """Order to send the rank's digest part and, with ``checkpoint``, to write its last share.

    The share is of a full checkpoint of ``step``. ``url`` is set for a second attempt at another
    place, after the run's checkpoint place failed: the digest is known by then, and files of the
    first attempt are deleted.
    """

    generation: Int
    step: Int
    checkpoint: bool = True
    term: Int = 0
    url: str = ""


class Depart(Body, frozen=True, kw_only=True):
    """Order to exit: the run is over, or goes on without this node, which has left."""

    reason: str = ""


class Fenced(Body, frozen=True, kw_only=True):
    """Order to exit: the worker is not, or no longer, a member (rule 31)."""

    reason: str = ""


class Checkpoint(Body, frozen=True, kw_only=True):
    """Order to snapshot and persist what ``detail`` (JSON) selects, after ``step``."""

    generation: Int
    step: Int
    detail: str = ""


class AskStacks(Body, frozen=True, kw_only=True):
    """Order to send the Python stacks of the process; answered by Stacks."""


# ---- driver <-> controller -------------------------------------------------------------------


class DriverHello(Body, frozen=True, kw_only=True):
    """The driver opens its stream, and says which message of the controller it heard last."""

    run: str
    term: Int = 0  # of the controller that sent the message
    heard: Int = 0  # number of the message in that term; 0: none


class WorkerDied(Body, frozen=True, kw_only=True):
    """The launcher saw a worker process end; ``cause`` says how.

    The other fields are the last note of the process, if it died inside a user function, and what
    the process wrote while it crashed.
    """

    worker: str
    cause: str = ""
    generation: Int = 0
    rank: Int = -1
    step: Int = 0
    phase: str = ""
    sample_ids: tuple[Int, ...] = ()
    place: str = ""
    crash: str = ""
    shown: str = ""


class NodeNotice(Body, frozen=True, kw_only=True):
    """The cluster announces that the node's machine goes away in ``notice_s`` seconds."""

    node_key: str
    notice_s: float = 0.0
    cause: str = ""


class Injected(Body, frozen=True, kw_only=True):
    """The driver is about to inject a random fault into a node."""

    kind: str
    node_key: str = ""
    spec: str = ""


class StopRun(Body, frozen=True, kw_only=True):
    """Order to end the run, at the next pause or (``now``) at once.

    ``preempted`` means that the machine asks for the stop, not the user. ``failure`` is set if the
    driver cannot go on.
    """

    now: bool = False
    reason: str = ""
    preempted: bool = False
    failure: Failure | None = None


class NodesAwaited(Body, frozen=True, kw_only=True):
    """Number of missing nodes; sent when it changes, and to each new controller."""

    missing: Int = 0  # without a machine
    coming: Int = 0  # being started
    reason: str = ""  # why they are missing
    is_troubled: bool = False  # there are machines, but nodes do not start there
    is_hopeless: bool = False  # no node is there, and no start will be tried any more


class MachineJudged(Body, frozen=True, kw_only=True):
    """A machine on which nodes die, or do not start, again and again."""

    machine: str
    reason: str
    is_banned: bool  # not used any more; False: suspect


class Record(Body, frozen=True, kw_only=True):
    """One line of events.jsonl."""

    line: str


class StartNode(Body, frozen=True, kw_only=True):
    """Order to start a node, because the run holds with too few or a "join" fault adds one."""

    reason: str = ""
    is_extra: bool = False  # in addition to the wanted nodes


class NodeUp(Body, frozen=True, kw_only=True):
    """All processes of a node have said hello."""

    node_key: str


class NodeEndsMachine(Body, frozen=True, kw_only=True):
    """The node leaves or ends by an injected fault: do not use its place on the machine again."""

    node_key: str


class KillNode(Body, frozen=True, kw_only=True):
    """Order to kill the remaining processes of a lost node."""

    node_key: str
    cause: str = ""
    is_silent: bool = False  # the node was not seen to end: silent, or without progress


class Pulse(Body, frozen=True, kw_only=True):
    """Sign of life of the controller's loop."""


class ControllerFailed(Body, frozen=True, kw_only=True):
    """The controller cannot go on, and its process ends."""

    failure: Failure


class RunOver(Body, frozen=True, kw_only=True):
    """The run has ended; ``failure`` says why it did not finish, and ``result`` is JSON."""

    status: Status
    failure: Failure | None = None
    result: str = ""


class KillController(Body, frozen=True, kw_only=True):
    """Fault injection: end the controller's process with SIGKILL."""


# ---- what goes over each half of a stream ------------------------------------------------------


class FromWorker(Struct, frozen=True):
    """One message of a worker to the controller."""

    body: (
        Hello
        | Heartbeat
        | Vector
        | Suspicion
        | Report
        | Aligned
        | Ready
        | Paused
        | LeaveRequest
        | FaultFired
        | DigestPart
        | Finalized
        | UserError
        | ShareReported
        | ReplicaMismatch
        | Repaired
        | Evaluated
        | Healed
        | Stacks
    )


class ToWorker(Struct, frozen=True):
    """One message of the controller to a worker, with the term of the sender."""

    body: (
        Welcome
        | Fence
        | Align
        | Prepare
        | Resume
        | Pause
        | Ack
        | Go
        | InjectFault
        | Finalize
        | Depart
        | Fenced
        | Checkpoint
        | AskStacks
    )
    term: Int = 0


class FromDriver(Struct, frozen=True):
    """One message of the driver to the controller."""

    body: DriverHello | WorkerDied | NodeNotice | Injected | StopRun | NodesAwaited | MachineJudged


class ToDriver(Struct, frozen=True):
    """One message of the controller to the driver; messages of a term are numbered from 1.

    Pulses have no number: they are never sent again.
    """

    body: (
        Record
        | StartNode
        | NodeUp
        | NodeEndsMachine
        | KillNode
        | RunOver
        | KillController
        | Pulse
        | ControllerFailed
    )
    term: Int = 0
    number: Int = 0


Envelope = FromWorker | ToWorker | FromDriver | ToDriver
