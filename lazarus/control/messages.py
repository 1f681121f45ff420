"""What the controller, its workers and the driver say to each other: frozen records.

Each class is declared here once and nowhere else: ``runtime/rpc/codec.py`` writes and reads them as
msgpack by these very fields. A reader refuses a value of another type and ignores a field that it
does not know. Nothing here knows of streams, clocks or processes.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from lazarus.errors import StorageError
from lazarus.failure import Cause, Failure, Status

Int = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]  # what fits in 64 bits


class Body(Struct, frozen=True, kw_only=True, tag=True):
    """What travels between the controller and a worker or the driver; named on the wire."""


class Part(Struct, frozen=True, kw_only=True, array_like=True):
    """A piece of a body, of which there may be thousands: without names on the wire.

    New fields go to the end, with a default.
    """


# ---- worker -> controller --------------------------------------------------------------------


class Hello(Body, frozen=True, kw_only=True):
    """A worker opens its stream: the first time, or again after the controller came back."""

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
    """Alive; and how far the training thread is."""

    generation: Int
    step: Int
    phase: str = ""
    progress: Int = 0
    waiting: bool = False
    step_s: float = 0.0
    acked: Int = 0


class Vector(Body, frozen=True, kw_only=True):
    """The commit vector of one decided step: ``lanes`` is float64 little endian."""

    generation: Int
    step: Int
    lanes: bytes
    wall_s: float = 0.0
    at_s: float = 0.0  # when the controller heard of it; set there


class Suspicion(Body, frozen=True, kw_only=True):
    """A collective failed. Carries no state (protocol rule 16)."""

    generation: Int
    step: Int
    phase: str = ""
    error: str = ""
    bad_source: str = ""  # name of a copy that is no good
    storage_url: str = ""  # what storage refused; empty: the copy was read
    operation: str = ""  # and what was asked of it
    store: bool = False  # the rendezvous store did not answer, which says nothing of any node


class Tail(Part, frozen=True, kw_only=True):
    """The newest exchanges of a rank and where it is: evidence about why all were waiting."""

    group: str = ""
    last: Int = -1  # number of the newest exchange
    labels: tuple[str, ...] = ()  # up to it
    rank: Int = -1  # in the group
    step: Int = -1
    place: str = ""  # the line of the user's that the training thread is in
    mute: tuple[Int, ...] = ()  # ranks to which a link carries nothing
    places: tuple[str, ...] = ()  # for each label, the line of the user's that led to it


class Report(Body, frozen=True, kw_only=True):
    """The frozen answer to FENCE (rule 18)."""

    generation: Int
    committed: Int
    prepared: Int
    vectors: tuple[Vector, ...] = ()
    entered: Int = 0  # the generation whose RESUME it carried out last
    tail: Tail = Tail()


class Held(Part, frozen=True, kw_only=True):
    """Experts of one layer whose live copy this rank holds at the aligned step."""

    layer: Int
    experts: tuple[Int, ...]
    sums: tuple[Int, ...] = ()  # checksum of each; 0 or none: not made


class SnapshotHeld(Part, frozen=True, kw_only=True):
    """One expert copy in host memory of this rank's node."""

    layer: Int
    expert: Int
    generation: Int
    step: Int
    routed: Int = 0  # the expert's cumulative routed copies in it
    num_bytes: Int = 0


class TensorSum(Part, frozen=True, kw_only=True):
    """One tensor of the dense state as a rank has built it."""

    name: str
    kind: str  # element type and shape
    sum: Int  # checksum of its bytes


class Aligned(Body, frozen=True, kw_only=True):
    """The rank stands at ``step``; ``history`` is float64 [L, E] little endian."""

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
    tensors: tuple[TensorSum, ...] = ()  # before a rank's first step only
    place: str = ""  # where the user's builder of the model is defined, then as well
    settings_digest: str = ""  # of the optimizer's settings: they are no state, and yet equal


class StorageProblem(Part, frozen=True, kw_only=True):
    """What a disk or an object store refused."""

    url: str
    operation: str
    reason: str
    is_full: bool = False


def problem_of(error: StorageError) -> StorageProblem:
    """As it goes over the wire."""
    return StorageProblem(
        url=error.url, operation=error.operation, reason=error.reason, is_full=error.is_full
    )


class Ready(Body, frozen=True, kw_only=True):
    """Groups built, digests compared, every staged copy verified."""

    generation: Int
    plan_digest: str
    groups_s: float = 0.0
    transfer_s: float = 0.0
    bytes_received: Int = 0
    restored: tuple[SnapshotHeld, ...] = ()  # versions really read from storage
    history: bytes = b""  # load history, where all state came from a checkpoint
    place: StorageProblem | None = None  # the checkpoint place cannot be used from this node


class Paused(Body, frozen=True, kw_only=True):
    """The rank stopped at the boundary after ``step`` (rule 15), or finished the last step."""

    generation: Int
    step: Int


class LeaveRequest(Body, frozen=True, kw_only=True):
    """This node wants to go, and will not die before ``notice_s`` seconds."""

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
    count: Int = 1  # nodes that a join brings
    number: Int = 0  # of this worker's faults: said again to a new controller, it is the same one


class DigestItem(Part, frozen=True, kw_only=True):
    name: str
    sha256: bytes


class DigestPart(Body, frozen=True, kw_only=True):
    """This rank's share of the state digest: each item is on exactly one rank."""

    generation: Int
    step: Int
    items: tuple[DigestItem, ...] = ()


class Finalized(Body, frozen=True, kw_only=True):
    """The rank has written its share of the last checkpoint (``files`` is JSON), or could not."""

    generation: Int
    step: Int
    files: str = ""
    wall_s: float = 0.0
    url: str = ""  # where, as ``Finalize`` said
    num_bytes: Int = 0  # room that the share needs
    problem: StorageProblem | None = None


class UserError(Body, frozen=True, kw_only=True):
    """A rank cannot go on: the user's code raised, or (``cause``) the library's own did.

    ``place`` is the user's line, ``shown`` the traceback for people, ``traceback`` the whole one.
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
    url: str = ""  # of the storage that failed, where that is the cause
    operation: str = ""


class ShareReported(Body, frozen=True, kw_only=True):
    """A snapshot or persist of this node ended; ``record`` is JSON."""

    generation: Int
    step: Int
    record: str = ""


class ReplicaMismatch(Body, frozen=True, kw_only=True):
    """The run-time comparison of replicas found bits that differ; ``what`` is JSON."""

    generation: Int
    step: Int
    what: str = ""


class Repaired(Body, frozen=True, kw_only=True):
    """What the run-time comparison outvoted has the bits of the majority again."""

    generation: Int
    step: Int
    layer: Int = -1  # and expert -1: the dense state
    expert: Int = -1
    ranks: tuple[Int, ...] = ()


class Evaluated(Body, frozen=True, kw_only=True):
    """Held-out loss of the state after ``step``: a sum over all ranks and what it is a sum over."""

    generation: Int
    step: Int
    loss_sum: float = 0.0
    count: float = 0.0


class Healed(Body, frozen=True, kw_only=True):
    """Progress of healing behind training on this rank."""

    generation: Int
    step: Int
    bytes_received: Int = 0
    pending: Int = 0


class Stacks(Body, frozen=True, kw_only=True):
    text: str = ""


# ---- controller -> worker --------------------------------------------------------------------


class Welcome(Body, frozen=True, kw_only=True):
    node: Int


class Fence(Body, frozen=True, kw_only=True):
    generation: Int


class Align(Body, frozen=True, kw_only=True):
    """Stand at committed step ``step``; with ``commit``, by applying ``lanes`` if one behind.

    With ``reload`` ("url step", or "init") this rank's own state does not count: it takes that of
    the checkpoint.
    """

    generation: Int
    step: Int
    commit: bool = False
    lanes: bytes = b""
    reload: str = ""


class Seat(Part, frozen=True, kw_only=True):
    """One rank of a group."""

    worker: str
    node: Int
    host: str = "127.0.0.1"
    keeper: str = ""


class Move(Part, frozen=True, kw_only=True):
    """One expert's record from feeder ``source`` to feeder ``target``."""

    layer: Int
    expert: Int
    source: Int
    target: Int


class Restore(Part, frozen=True, kw_only=True):
    """Every replica of this expert comes back from one chosen copy (rule 27)."""

    layer: Int
    expert: Int
    source: str
    generation: Int
    step: Int
    detail: str = ""


class Prepare(Body, frozen=True, kw_only=True):
    """Build the groups of ``generation``, heal into staging, compare, and say Ready.

    ``seats`` are the training ranks in rank order; ``feeders`` the transfer group: the seats, then
    ranks of leaving nodes that still serve. ``speeds`` weighs the sample shares; empty: equal.
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
    reload: str = ""  # "url step": take dense state and history from this checkpoint first
    probe: bool = False  # write to the checkpoint place, and read what the other nodes wrote


class Resume(Body, frozen=True, kw_only=True):
    generation: Int
    step: Int
    plan_digest: str = ""
    lineage: str = "[]"
    double_k: bool = False  # the PLT budget is spent: save twice as many experts from now on
    save_all: bool = False  # no checkpoint stands: the next one holds every expert
    k_snapshot: Int = 0  # the schedule of saves from measured rates; 0: as configured
    snapshot_every: Int = 0
    persist_every: Int = 0
    halt: bool = False  # the run is being stopped: pause at once, before the next step


class Pause(Body, frozen=True, kw_only=True):
    """Raise your pause lane in the next vector you contribute."""

    generation: Int


class Ack(Body, frozen=True, kw_only=True):
    """Vectors up to ``step`` are journaled."""

    step: Int


class Go(Body, frozen=True, kw_only=True):
    """The injected fault is on record: let it happen."""

    spec: str
    is_done: bool = False  # another rank has struck it: do nothing


class InjectFault(Body, frozen=True, kw_only=True):
    """A random fault that only the process itself can show, on record already."""

    kind: str


class Finalize(Body, frozen=True, kw_only=True):
    """Digest, and with ``checkpoint`` write your share of a full checkpoint of ``step``.

    With ``url`` it is written there, after it could not be written where it belongs: the digest is
    known, and what was written of the first attempt goes.
    """

    generation: Int
    step: Int
    checkpoint: bool = True
    term: Int = 0
    url: str = ""


class Depart(Body, frozen=True, kw_only=True):
    """Leave in peace: the run is over, or goes on without you."""

    reason: str = ""


class Fenced(Body, frozen=True, kw_only=True):
    """You are not a member any more: exit (rule 31)."""

    reason: str = ""


class Checkpoint(Body, frozen=True, kw_only=True):
    """Snapshot and persist what ``detail`` (JSON) selects, at the boundary after ``step``."""

    generation: Int
    step: Int
    detail: str = ""


class AskStacks(Body, frozen=True, kw_only=True):
    """Send your Python stacks."""


# ---- driver <-> controller -------------------------------------------------------------------


class DriverHello(Body, frozen=True, kw_only=True):
    run: str


class WorkerDied(Body, frozen=True, kw_only=True):
    """The launcher saw a process end; ``cause`` says how it knows.

    The rest is what the process noted last, where that was inside a function of the user's, and
    what it wrote while it crashed.
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
    """The cluster says that this machine will go in ``notice_s`` seconds."""

    node_key: str
    notice_s: float = 0.0
    cause: str = ""


class Injected(Body, frozen=True, kw_only=True):
    """The driver is about to strike a node itself (random faults)."""

    kind: str
    node_key: str = ""
    spec: str = ""


class StopRun(Body, frozen=True, kw_only=True):
    """End the run: after the next commit, or at once.

    ``preempted``: the machine wants it, not the user. ``failure``: the driver cannot go on.
    """

    now: bool = False
    reason: str = ""
    preempted: bool = False
    failure: Failure | None = None


class NodesAwaited(Body, frozen=True, kw_only=True):
    """Nodes that are wanted and not there: told when it changes, and to each new controller."""

    missing: Int = 0  # without a machine
    coming: Int = 0  # being started
    reason: str = ""  # what machines lack
    is_troubled: bool = False  # there are machines, but nodes do not start there
    is_hopeless: bool = False  # there is nobody, and nothing will be tried any more


class MachineJudged(Body, frozen=True, kw_only=True):
    """A machine on which nodes die, or do not start, again and again."""

    machine: str
    reason: str
    is_banned: bool  # left alone from now on; else suspect


class Record(Body, frozen=True, kw_only=True):
    """One line of events.jsonl, as written."""

    line: str


class StartNode(Body, frozen=True, kw_only=True):
    """The run holds for want of nodes; or a fault on purpose adds one."""

    reason: str = ""
    is_extra: bool = False  # beyond the nodes that are wanted


class NodeUp(Body, frozen=True, kw_only=True):
    """All processes of a node have said hello."""

    node_key: str


class NodeEndsMachine(Body, frozen=True, kw_only=True):
    """When this node goes its machine is taken as gone too: it leaves, or ends on purpose."""

    node_key: str


class KillNode(Body, frozen=True, kw_only=True):
    """A node is lost: end what is left of it."""

    node_key: str
    cause: str = ""
    is_silent: bool = False  # it was not seen to end: it says nothing, or does not move


class Pulse(Body, frozen=True, kw_only=True):
    """The controller's loop turns."""


class ControllerFailed(Body, frozen=True, kw_only=True):
    """The last word of a controller that cannot go on: its process ends."""

    failure: Failure


class RunOver(Body, frozen=True, kw_only=True):
    """The end: why it was not a good one, if it was not; ``result`` is JSON."""

    status: Status
    failure: Failure | None = None
    result: str = ""


class KillController(Body, frozen=True, kw_only=True):
    """Fault injection: end the controller's process with SIGKILL."""


# ---- what goes over each half of a stream ------------------------------------------------------


class FromWorker(Struct, frozen=True):
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
    body: DriverHello | WorkerDied | NodeNotice | Injected | StopRun | NodesAwaited | MachineJudged


class ToDriver(Struct, frozen=True):
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


Envelope = FromWorker | ToWorker | FromDriver | ToDriver
