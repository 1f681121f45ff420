"""What the controller hears and what it orders: plain frozen records, named as on the wire.

The bodies carry exactly the fields of ``runtime/rpc/lazarus.proto``; the codec in the runtime maps
one to the other by name. Nothing here knows of streams, clocks or processes.
"""

from __future__ import annotations

from dataclasses import dataclass


class Body:
    """Marker of everything that travels between the controller and a worker or the driver."""


# ---- worker -> controller --------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Hello(Body):
    """A worker opens its stream: the first time, or again after the controller came back."""

    worker: str
    node_key: str
    local_rank: int = 0
    ranks_per_node: int = 1
    host: str = "127.0.0.1"
    pid: int = 0
    version: str = ""
    term: int = 0
    generation: int = 0
    fence: int = 0
    committed: int = 0
    keeper: str = ""
    zone: str = ""
    memory_bytes: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Heartbeat(Body):
    """Alive; and how far the training thread is."""

    generation: int
    step: int
    phase: str = ""
    progress: int = 0
    waiting: bool = False
    step_s: float = 0.0
    acked: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Vector(Body):
    """The commit vector of one decided step: ``lanes`` is float64 little endian."""

    generation: int
    step: int
    lanes: bytes
    wall_s: float = 0.0
    at_s: float = 0.0  # when the controller heard of it; set there


@dataclass(frozen=True, kw_only=True, slots=True)
class Suspicion(Body):
    """A collective failed. Carries no state (protocol rule 16)."""

    generation: int
    step: int
    phase: str = ""
    error: str = ""
    bad_source: str = ""  # JSON of the restore whose copy was no good


@dataclass(frozen=True, kw_only=True, slots=True)
class Report(Body):
    """The frozen answer to FENCE (rule 18)."""

    generation: int
    committed: int
    prepared: int
    vectors: tuple[Vector, ...] = ()
    entered: int = 0  # the generation whose RESUME it carried out last


@dataclass(frozen=True, kw_only=True, slots=True)
class Held(Body):
    """Experts of one layer whose live copy this rank holds at the aligned step."""

    layer: int
    experts: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapped(Body):
    """One expert copy in host memory of this rank's node."""

    layer: int
    expert: int
    generation: int
    step: int
    routed: int = 0  # the expert's cumulative routed copies in it
    num_bytes: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Aligned(Body):
    """The rank stands at ``step``; ``history`` is float64 [L, E] little endian."""

    generation: int
    step: int
    dense_digest: str = ""
    history_digest: str = ""
    history: bytes = b""
    held: tuple[Held, ...] = ()
    scalars: str = ""
    dense_bytes: int = 0
    expert_bytes: int = 0
    num_layers: int = 0
    num_experts: int = 0
    top_k: int = 0
    snapshots: tuple[Snapped, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Ready(Body):
    """Groups built, digests compared, every staged copy verified."""

    generation: int
    plan_digest: str
    groups_s: float = 0.0
    transfer_s: float = 0.0
    bytes_received: int = 0
    restored: tuple[Snapped, ...] = ()  # versions really read from storage
    history: bytes = b""  # load history, where all state came from a checkpoint


@dataclass(frozen=True, kw_only=True, slots=True)
class Paused(Body):
    """The rank stopped at the boundary after ``step`` (rule 15), or finished the last step."""

    generation: int
    step: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LeaveRequest(Body):
    """This node wants to go, and will not die before ``notice_s`` seconds."""

    generation: int
    notice_s: float = 0.0
    cause: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class FaultFired(Body):
    """An injected fault is about to happen on this worker, once the controller says Go."""

    generation: int
    step: int
    kind: str
    phase: str = ""
    spec: str = ""
    count: int = 1  # nodes that a join brings
    number: int = 0  # of this worker's faults: said again to a new controller, it is the same one


@dataclass(frozen=True, kw_only=True, slots=True)
class DigestItem(Body):
    name: str
    sha256: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class DigestPart(Body):
    """This rank's share of the state digest: each item is on exactly one rank."""

    generation: int
    step: int
    items: tuple[DigestItem, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Finalized(Body):
    """The rank has written its share of the last checkpoint (``files`` is JSON)."""

    generation: int
    step: int
    files: str = ""
    wall_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class UserError(Body):
    """The user's model, data or loss raised."""

    generation: int
    step: int
    error: str = ""
    traceback: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshotted(Body):
    """A snapshot or persist of this node ended; ``record`` is JSON."""

    generation: int
    step: int
    record: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Odd(Body):
    """The run-time comparison of replicas found bits that differ; ``what`` is JSON."""

    generation: int
    step: int
    what: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluated(Body):
    """Held-out loss of the state after ``step``: a sum over all ranks and what it is a sum over."""

    generation: int
    step: int
    loss_sum: float = 0.0
    count: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Healed(Body):
    """Progress of healing behind training on this rank."""

    generation: int
    step: int
    bytes_received: int = 0
    pending: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Stacks(Body):
    text: str = ""


# ---- controller -> worker --------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Welcome(Body):
    node: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Fence(Body):
    generation: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Align(Body):
    """Stand at committed step ``step``; with ``commit``, by applying ``lanes`` if one behind."""

    generation: int
    step: int
    commit: bool = False
    lanes: bytes = b""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seat(Body):
    """One rank of a group."""

    worker: str
    node: int
    host: str = "127.0.0.1"
    keeper: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Move(Body):
    """One expert's record from feeder ``source`` to feeder ``target``."""

    layer: int
    expert: int
    source: int
    target: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Restore(Body):
    """Every replica of this expert comes back from one chosen copy (rule 27)."""

    layer: int
    expert: int
    source: str
    generation: int
    step: int
    detail: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepare(Body):
    """Build the groups of ``generation``, heal into staging, compare, and say Ready.

    ``seats`` are the training ranks in rank order; ``feeders`` the transfer group: the seats, then
    ranks of leaving nodes that still serve. ``speeds`` weighs the sample shares; empty: equal.
    """

    generation: int
    step: int
    seats: tuple[Seat, ...]
    feeders: tuple[Seat, ...]
    plan: str
    moves: tuple[Move, ...] = ()
    moves_behind: tuple[Move, ...] = ()
    dense_sources: tuple[int, ...] = ()
    dense_targets: tuple[int, ...] = ()
    store: str = ""
    scalars: str = ""
    history: bytes = b""
    restores: tuple[Restore, ...] = ()
    speeds: tuple[float, ...] = ()
    lineage: str = "[]"
    reload: str = ""  # "url step": take dense state and history from this checkpoint first


@dataclass(frozen=True, kw_only=True, slots=True)
class Resume(Body):
    generation: int
    step: int
    plan_digest: str = ""
    lineage: str = "[]"
    double_k: bool = False  # the PLT budget is spent: save twice as many experts from now on
    save_all: bool = False  # no checkpoint stands: the next one holds every expert
    k_snapshot: int = 0  # the schedule of saves from measured rates; 0: as configured
    snapshot_every: int = 0
    persist_every: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Pause(Body):
    """Raise your pause lane in the next vector you contribute."""

    generation: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Ack(Body):
    """Vectors up to ``step`` are journaled."""

    step: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Go(Body):
    """The injected fault is on record: let it happen."""

    spec: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Strike(Body):
    """A random fault that only the process itself can show, on record already."""

    kind: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Finalize(Body):
    """Digest, and with ``checkpoint`` write your share of a full checkpoint of ``step``."""

    generation: int
    step: int
    checkpoint: bool = True
    term: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Depart(Body):
    """Leave in peace: the run is over, or goes on without you."""

    reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fenced(Body):
    """You are not a member any more: exit (rule 31)."""

    reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint(Body):
    """Snapshot and persist what ``detail`` (JSON) selects, at the boundary after ``step``."""

    generation: int
    step: int
    detail: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class AskStacks(Body):
    """Send your Python stacks."""


# ---- driver <-> controller -------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class DriverHello(Body):
    run: str


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerDied(Body):
    """The launcher saw a process end; ``cause`` says how it knows."""

    worker: str
    cause: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeNotice(Body):
    """The cluster says that this machine will go in ``notice_s`` seconds."""

    node_key: str
    notice_s: float = 0.0
    cause: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Injected(Body):
    """The driver is about to strike a node itself (random faults)."""

    kind: str
    node_key: str = ""
    spec: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class StopRun(Body):
    now: bool = False
    reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class NodesWanted(Body):
    nodes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Record(Body):
    """One line of events.jsonl, as written."""

    line: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StartNode(Body):
    reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class KillNode(Body):
    node_key: str
    cause: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOver(Body):
    """The end: ``error`` and ``result`` are JSON."""

    status: str
    error: str = ""
    result: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class KillController(Body):
    """Fault injection: end the controller's process with SIGKILL."""
