from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Hello(_message.Message):
    __slots__ = ("worker", "node_key", "local_rank", "ranks_per_node", "host", "pid", "version", "term", "generation", "fence", "committed", "keeper", "zone", "memory_bytes")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    NODE_KEY_FIELD_NUMBER: _ClassVar[int]
    LOCAL_RANK_FIELD_NUMBER: _ClassVar[int]
    RANKS_PER_NODE_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    FENCE_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    KEEPER_FIELD_NUMBER: _ClassVar[int]
    ZONE_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    worker: str
    node_key: str
    local_rank: int
    ranks_per_node: int
    host: str
    pid: int
    version: str
    term: int
    generation: int
    fence: int
    committed: int
    keeper: str
    zone: str
    memory_bytes: int
    def __init__(self, worker: _Optional[str] = ..., node_key: _Optional[str] = ..., local_rank: _Optional[int] = ..., ranks_per_node: _Optional[int] = ..., host: _Optional[str] = ..., pid: _Optional[int] = ..., version: _Optional[str] = ..., term: _Optional[int] = ..., generation: _Optional[int] = ..., fence: _Optional[int] = ..., committed: _Optional[int] = ..., keeper: _Optional[str] = ..., zone: _Optional[str] = ..., memory_bytes: _Optional[int] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("generation", "step", "phase", "progress", "waiting", "step_s", "acked")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    STEP_S_FIELD_NUMBER: _ClassVar[int]
    ACKED_FIELD_NUMBER: _ClassVar[int]
    generation: int
    step: int
    phase: str
    progress: int
    waiting: bool
    step_s: float
    acked: int
    def __init__(self, generation: _Optional[int] = ..., step: _Optional[int] = ..., phase: _Optional[str] = ..., progress: _Optional[int] = ..., waiting: _Optional[bool] = ..., step_s: _Optional[float] = ..., acked: _Optional[int] = ...) -> None: ...

class Vector(_message.Message):
    __slots__ = ("generation", "step", "lanes", "wall_s", "at_s")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LANES_FIELD_NUMBER: _ClassVar[int]
    WALL_S_FIELD_NUMBER: _ClassVar[int]
    AT_S_FIELD_NUMBER: _ClassVar[int]
    generation: int
    step: int
    lanes: bytes
    wall_s: float
    at_s: float
    def __init__(self, generation: _Optional[int] = ..., step: _Optional[int] = ..., lanes: _Optional[bytes] = ..., wall_s: _Optional[float] = ..., at_s: _Optional[float] = ...) -> None: ...

class Suspicion(_message.Message):
    __slots__ = ("generation", "step", "phase", "error", "bad_source")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    BAD_SOURCE_FIELD_NUMBER: _ClassVar[int]
    generation: int
    step: int
    phase: str
    error: str
    bad_source: str
    def __init__(self, generation: _Optional[int] = ..., step: _Optional[int] = ..., phase: _Optional[str] = ..., error: _Optional[str] = ..., bad_source: _Optional[str] = ...) -> None: ...

class Report(_message.Message):
    __slots__ = ("generation", "committed", "prepared", "vectors", "entered")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    PREPARED_FIELD_NUMBER: _ClassVar[int]
    VECTORS_FIELD_NUMBER: _ClassVar[int]
    ENTERED_FIELD_NUMBER: _ClassVar[int]
    generation: int
    committed: int
    prepared: int
    vectors: _containers.RepeatedCompositeFieldContainer[Vector]
    entered: int
    def __init__(self, generation: _Optional[int] = ..., committed: _Optional[int] = ..., prepared: _Optional[int] = ..., vectors: _Optional[_Iterable[_Union[Vector, _Mapping]]] = ..., entered: _Optional[int] = ...) -> None: ...

class Held(_message.Message):
    __slots__ = ("layer", "experts")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    layer: int
    experts: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, layer: _Optional[int] = ..., experts: _Optional[_Iterable[int]] = ...) -> None: ...

class Snapped(_message.Message):
    __slots__ = ("layer", "expert", "generation", "step", "routed", "num_bytes")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    ROUTED_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    layer: int
    expert: int
    generation: int
    step: int
    routed: int
    num_bytes: int
    def __init__(self, layer: _Optional[int] = ..., expert: _Optional[int] = ..., generation: _Optional[int] = ..., step: _Optional[int] = ..., routed: _Optional[int] = ..., num_bytes: _Optional[int] = ...) -> None: ...

class Aligned(_message.Message):
    __slots__ = ("generation", "step", "dense_digest", "history_digest", "history", "held", "scalars", "dense_bytes", "expert_bytes", "snapshots", "num_layers", "num_experts", "top_k")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    DENSE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    HISTORY_DIGEST_FIELD_NUMBER: _ClassVar[int]
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    SCALARS_FIELD_NUMBER: _ClassVar[int]
    DENSE_BYTES_FIELD_NUMBER: _ClassVar[int]
    EXPERT_BYTES_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOTS_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    generation: int
    step: int
    dense_digest: str
    history_digest: str
    history: bytes
    held: _containers.RepeatedCompositeFieldContainer[Held]
    scalars: str
    dense_bytes: int
    expert_bytes: int
    snapshots: _containers.RepeatedCompositeFieldContainer[Snapped]
    num_layers: int
    num_experts: int
    top_k: int
    def __init__(self, generation: _Optional[int] = ..., step: _Optional[int] = ..., dense_digest: _Optional[str] = ..., history_digest: _Optional[str] = ..., history: _Optional[bytes] = ..., held: _Optional[_Iterable[_Union[Held, _Mapping]]] = ..., scalars: _Optional[str] = ..., dense_bytes: _Optional[int] = ..., expert_bytes: _Optional[int] = ..., snapshots: _Optional[_Iterable[_Union[Snapped, _Mapping]]] = ..., num_layers: _Optional[int] = ..., num_experts: _Optional[int] = ..., top_k: _Optional[int] = ...) -> None: ...

class Ready(_message.Message):
    __slots__ = ("generation", "plan_digest", "groups_s", "transfer_s", "bytes_received", "restored", "history")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    PLAN_DIGEST_FIELD_NUMBER: _ClassVar[int]
    GROUPS_S_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_S_FIELD_NUMBER: _ClassVar[int]
    BYTES_RECEIVED_FIELD_NUMBER: _ClassVar[int]
    RESTORED_FIELD_NUMBER: _ClassVar[int]
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    generation: int
    plan_digest: str
    groups_s: float
    transfer_s: float
    bytes_received: int
    restored: _containers.RepeatedCompositeFieldContainer[Snapped]
    history: bytes
    def __init__(self, generation: _Optional[int] = ..., plan_digest: _Optional[str] = ..., groups_s: _Optional[float] = ..., transfer_s: _Optional[float] = ..., bytes_received: _Optional[int] = ..., restored: _Optional[_Iterable[_Union[Snapped, _Mapping]]] = ..., history: _Optional[bytes] = ...) -> None: ...

class Paused(_message.Message):
    __slots__ = ("generation", "step")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    generation: int
    step: int
    def __init__(self, generation: _Optional[int] = ..., step: _Optional[int] = ...) -> None: ...

class LeaveRequest(_message.Message):
    __slots__ = ("generation", "notice_s", "cause")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    NOTICE_S_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    generation: int
    notice_s: float
    cause: str
    def __init__(self, generation: _Optional[int] = ..., notice_s: _Optional[float] = ..., cause: _Optional[str] = ...) -> None: ...

class FaultFired(_message.Message):
    __slots__ = ("generation", "step", "kind", "phase", "spec", "count", "number")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    generation: int
    step: int
    kind: str
    phase: str
    spec: str
    count: int
    number: int
    def __init__(self, generation: _Optional[int] = ..., step: _Optional[int] = ..., kind: _Optional[str] = ..., phase: _Optional[str] = ..., spec: _Optional[str] = ..., count: _Optional[int] = ..., number: _Optional[int] = ...) -> None: ...

class DigestItem(_message.Message):
    __slots__ = ("name", "sha256")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    name: str
    sha256: bytes
    def __init__(self, name: _Optional[str] = ..., sha256: _Optional[bytes] = ...) -> None: ...

class DigestPart(_message.Message):
    __slots__ = ("generation", "step", "items")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    generation: int
    step: int
    items: _containers.RepeatedCompositeFieldContainer[DigestItem]
    def __init__(self, generation: _Optional[int] = ..., step: _Optional[int] = ..., items: _Optional[_Iterable[_Union[DigestItem, _Mapping]]] = ...) -> None: ...

class Finalized(_message.Message):
    __slots__ = ("generation", "step", "files", "wall_s")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    WALL_S_FIELD_NUMBER: _ClassVar[int]
    generation: int
    step: int
    files: str
    wall_s: float
    def __init__(self, generation: _Optional[int] = ..., step: _Optional[int] = ..., files: _Optional[str] = ..., wall_s: _Optional[float] = ...) -> None: ...

class UserError(_message.Message):
    __slots__ = ("generation", "step", "error", "traceback")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    TRACEBACK_FIELD_NUMBER: _ClassVar[int]
    generation: int
    step: int
    error: str
    traceback: str
    def __init__(self, generation: _Optional[int] = ..., step: _Optional[int] = ..., error: _Optional[str] = ..., traceback: _Optional[str] = ...) -> None: ...

class Snapshotted(_message.Message):
    __slots__ = ("generation", "step", "record")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    RECORD_FIELD_NUMBER: _ClassVar[int]
    generation: int
    step: int
    record: str
    def __init__(self, generation: _Optional[int] = ..., step: _Optional[int] = ..., record: _Optional[str] = ...) -> None: ...

class Odd(_message.Message):
    __slots__ = ("generation", "step", "what")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    WHAT_FIELD_NUMBER: _ClassVar[int]
    generation: int
    step: int
    what: str
    def __init__(self, generation: _Optional[int] = ..., step: _Optional[int] = ..., what: _Optional[str] = ...) -> None: ...

class Evaluated(_message.Message):
    __slots__ = ("generation", "step", "loss_sum", "count")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LOSS_SUM_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    generation: int
    step: int
    loss_sum: float
    count: float
    def __init__(self, generation: _Optional[int] = ..., step: _Optional[int] = ..., loss_sum: _Optional[float] = ..., count: _Optional[float] = ...) -> None: ...

class Healed(_message.Message):
    __slots__ = ("generation", "step", "bytes_received", "pending")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    BYTES_RECEIVED_FIELD_NUMBER: _ClassVar[int]
    PENDING_FIELD_NUMBER: _ClassVar[int]
    generation: int
    step: int
    bytes_received: int
    pending: int
    def __init__(self, generation: _Optional[int] = ..., step: _Optional[int] = ..., bytes_received: _Optional[int] = ..., pending: _Optional[int] = ...) -> None: ...

class Stacks(_message.Message):
    __slots__ = ("text",)
    TEXT_FIELD_NUMBER: _ClassVar[int]
    text: str
    def __init__(self, text: _Optional[str] = ...) -> None: ...

class FromWorker(_message.Message):
    __slots__ = ("hello", "heartbeat", "vector", "suspicion", "report", "aligned", "ready", "paused", "leave_request", "fault_fired", "digest_part", "finalized", "user_error", "snapshotted", "odd", "healed", "stacks", "evaluated")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    SUSPICION_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    ALIGNED_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    PAUSED_FIELD_NUMBER: _ClassVar[int]
    LEAVE_REQUEST_FIELD_NUMBER: _ClassVar[int]
    FAULT_FIRED_FIELD_NUMBER: _ClassVar[int]
    DIGEST_PART_FIELD_NUMBER: _ClassVar[int]
    FINALIZED_FIELD_NUMBER: _ClassVar[int]
    USER_ERROR_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOTTED_FIELD_NUMBER: _ClassVar[int]
    ODD_FIELD_NUMBER: _ClassVar[int]
    HEALED_FIELD_NUMBER: _ClassVar[int]
    STACKS_FIELD_NUMBER: _ClassVar[int]
    EVALUATED_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    heartbeat: Heartbeat
    vector: Vector
    suspicion: Suspicion
    report: Report
    aligned: Aligned
    ready: Ready
    paused: Paused
    leave_request: LeaveRequest
    fault_fired: FaultFired
    digest_part: DigestPart
    finalized: Finalized
    user_error: UserError
    snapshotted: Snapshotted
    odd: Odd
    healed: Healed
    stacks: Stacks
    evaluated: Evaluated
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., vector: _Optional[_Union[Vector, _Mapping]] = ..., suspicion: _Optional[_Union[Suspicion, _Mapping]] = ..., report: _Optional[_Union[Report, _Mapping]] = ..., aligned: _Optional[_Union[Aligned, _Mapping]] = ..., ready: _Optional[_Union[Ready, _Mapping]] = ..., paused: _Optional[_Union[Paused, _Mapping]] = ..., leave_request: _Optional[_Union[LeaveRequest, _Mapping]] = ..., fault_fired: _Optional[_Union[FaultFired, _Mapping]] = ..., digest_part: _Optional[_Union[DigestPart, _Mapping]] = ..., finalized: _Optional[_Union[Finalized, _Mapping]] = ..., user_error: _Optional[_Union[UserError, _Mapping]] = ..., snapshotted: _Optional[_Union[Snapshotted, _Mapping]] = ..., odd: _Optional[_Union[Odd, _Mapping]] = ..., healed: _Optional[_Union[Healed, _Mapping]] = ..., stacks: _Optional[_Union[Stacks, _Mapping]] = ..., evaluated: _Optional[_Union[Evaluated, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("node",)
    NODE_FIELD_NUMBER: _ClassVar[int]
    node: int
    def __init__(self, node: _Optional[int] = ...) -> None: ...

class Fence(_message.Message):
    __slots__ = ("generation",)
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    generation: int
    def __init__(self, generation: _Optional[int] = ...) -> None: ...

class Align(_message.Message):
    __slots__ = ("generation", "step", "commit", "lanes")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    LANES_FIELD_NUMBER: _ClassVar[int]
    generation: int
    step: int
    commit: bool
    lanes: bytes
    def __init__(self, generation: _Optional[int] = ..., step: _Optional[int] = ..., commit: _Optional[bool] = ..., lanes: _Optional[bytes] = ...) -> None: ...

class Seat(_message.Message):
    __slots__ = ("worker", "node", "host", "keeper")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    KEEPER_FIELD_NUMBER: _ClassVar[int]
    worker: str
    node: int
    host: str
    keeper: str
    def __init__(self, worker: _Optional[str] = ..., node: _Optional[int] = ..., host: _Optional[str] = ..., keeper: _Optional[str] = ...) -> None: ...

class Move(_message.Message):
    __slots__ = ("layer", "expert", "source", "target")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    layer: int
    expert: int
    source: int
    target: int
    def __init__(self, layer: _Optional[int] = ..., expert: _Optional[int] = ..., source: _Optional[int] = ..., target: _Optional[int] = ...) -> None: ...

class Restore(_message.Message):
    __slots__ = ("layer", "expert", "source", "generation", "step", "detail")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    layer: int
    expert: int
    source: str
    generation: int
    step: int
    detail: str
    def __init__(self, layer: _Optional[int] = ..., expert: _Optional[int] = ..., source: _Optional[str] = ..., generation: _Optional[int] = ..., step: _Optional[int] = ..., detail: _Optional[str] = ...) -> None: ...

class Prepare(_message.Message):
    __slots__ = ("generation", "step", "seats", "feeders", "plan", "moves", "moves_behind", "dense_sources", "dense_targets", "store", "scalars", "history", "restores", "speeds", "lineage", "reload")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    SEATS_FIELD_NUMBER: _ClassVar[int]
    FEEDERS_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    MOVES_FIELD_NUMBER: _ClassVar[int]
    MOVES_BEHIND_FIELD_NUMBER: _ClassVar[int]
    DENSE_SOURCES_FIELD_NUMBER: _ClassVar[int]
    DENSE_TARGETS_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
    SCALARS_FIELD_NUMBER: _ClassVar[int]
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    RESTORES_FIELD_NUMBER: _ClassVar[int]
    SPEEDS_FIELD_NUMBER: _ClassVar[int]
    LINEAGE_FIELD_NUMBER: _ClassVar[int]
    RELOAD_FIELD_NUMBER: _ClassVar[int]
    generation: int
    step: int
    seats: _containers.RepeatedCompositeFieldContainer[Seat]
    feeders: _containers.RepeatedCompositeFieldContainer[Seat]
    plan: str
    moves: _containers.RepeatedCompositeFieldContainer[Move]
    moves_behind: _containers.RepeatedCompositeFieldContainer[Move]
    dense_sources: _containers.RepeatedScalarFieldContainer[int]
    dense_targets: _containers.RepeatedScalarFieldContainer[int]
    store: str
    scalars: str
    history: bytes
    restores: _containers.RepeatedCompositeFieldContainer[Restore]
    speeds: _containers.RepeatedScalarFieldContainer[float]
    lineage: str
    reload: str
    def __init__(self, generation: _Optional[int] = ..., step: _Optional[int] = ..., seats: _Optional[_Iterable[_Union[Seat, _Mapping]]] = ..., feeders: _Optional[_Iterable[_Union[Seat, _Mapping]]] = ..., plan: _Optional[str] = ..., moves: _Optional[_Iterable[_Union[Move, _Mapping]]] = ..., moves_behind: _Optional[_Iterable[_Union[Move, _Mapping]]] = ..., dense_sources: _Optional[_Iterable[int]] = ..., dense_targets: _Optional[_Iterable[int]] = ..., store: _Optional[str] = ..., scalars: _Optional[str] = ..., history: _Optional[bytes] = ..., restores: _Optional[_Iterable[_Union[Restore, _Mapping]]] = ..., speeds: _Optional[_Iterable[float]] = ..., lineage: _Optional[str] = ..., reload: _Optional[str] = ...) -> None: ...

class Resume(_message.Message):
    __slots__ = ("generation", "step", "plan_digest", "lineage", "double_k", "save_all", "k_snapshot", "snapshot_every", "persist_every")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    PLAN_DIGEST_FIELD_NUMBER: _ClassVar[int]
    LINEAGE_FIELD_NUMBER: _ClassVar[int]
    DOUBLE_K_FIELD_NUMBER: _ClassVar[int]
    SAVE_ALL_FIELD_NUMBER: _ClassVar[int]
    K_SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_EVERY_FIELD_NUMBER: _ClassVar[int]
    PERSIST_EVERY_FIELD_NUMBER: _ClassVar[int]
    generation: int
    step: int
    plan_digest: str
    lineage: str
    double_k: bool
    save_all: bool
    k_snapshot: int
    snapshot_every: int
    persist_every: int
    def __init__(self, generation: _Optional[int] = ..., step: _Optional[int] = ..., plan_digest: _Optional[str] = ..., lineage: _Optional[str] = ..., double_k: _Optional[bool] = ..., save_all: _Optional[bool] = ..., k_snapshot: _Optional[int] = ..., snapshot_every: _Optional[int] = ..., persist_every: _Optional[int] = ...) -> None: ...

class Pause(_message.Message):
    __slots__ = ("generation",)
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    generation: int
    def __init__(self, generation: _Optional[int] = ...) -> None: ...

class Ack(_message.Message):
    __slots__ = ("step",)
    STEP_FIELD_NUMBER: _ClassVar[int]
    step: int
    def __init__(self, step: _Optional[int] = ...) -> None: ...

class Go(_message.Message):
    __slots__ = ("spec",)
    SPEC_FIELD_NUMBER: _ClassVar[int]
    spec: str
    def __init__(self, spec: _Optional[str] = ...) -> None: ...

class Strike(_message.Message):
    __slots__ = ("kind",)
    KIND_FIELD_NUMBER: _ClassVar[int]
    kind: str
    def __init__(self, kind: _Optional[str] = ...) -> None: ...

class Finalize(_message.Message):
    __slots__ = ("generation", "step", "checkpoint", "term")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    generation: int
    step: int
    checkpoint: bool
    term: int
    def __init__(self, generation: _Optional[int] = ..., step: _Optional[int] = ..., checkpoint: _Optional[bool] = ..., term: _Optional[int] = ...) -> None: ...

class Depart(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class Fenced(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class Checkpoint(_message.Message):
    __slots__ = ("generation", "step", "detail")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    generation: int
    step: int
    detail: str
    def __init__(self, generation: _Optional[int] = ..., step: _Optional[int] = ..., detail: _Optional[str] = ...) -> None: ...

class AskStacks(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ToWorker(_message.Message):
    __slots__ = ("term", "welcome", "fence", "align", "prepare", "resume", "pause", "ack", "go", "finalize", "depart", "fenced", "checkpoint", "ask_stacks", "strike")
    TERM_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    FENCE_FIELD_NUMBER: _ClassVar[int]
    ALIGN_FIELD_NUMBER: _ClassVar[int]
    PREPARE_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    PAUSE_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    GO_FIELD_NUMBER: _ClassVar[int]
    FINALIZE_FIELD_NUMBER: _ClassVar[int]
    DEPART_FIELD_NUMBER: _ClassVar[int]
    FENCED_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    ASK_STACKS_FIELD_NUMBER: _ClassVar[int]
    STRIKE_FIELD_NUMBER: _ClassVar[int]
    term: int
    welcome: Welcome
    fence: Fence
    align: Align
    prepare: Prepare
    resume: Resume
    pause: Pause
    ack: Ack
    go: Go
    finalize: Finalize
    depart: Depart
    fenced: Fenced
    checkpoint: Checkpoint
    ask_stacks: AskStacks
    strike: Strike
    def __init__(self, term: _Optional[int] = ..., welcome: _Optional[_Union[Welcome, _Mapping]] = ..., fence: _Optional[_Union[Fence, _Mapping]] = ..., align: _Optional[_Union[Align, _Mapping]] = ..., prepare: _Optional[_Union[Prepare, _Mapping]] = ..., resume: _Optional[_Union[Resume, _Mapping]] = ..., pause: _Optional[_Union[Pause, _Mapping]] = ..., ack: _Optional[_Union[Ack, _Mapping]] = ..., go: _Optional[_Union[Go, _Mapping]] = ..., finalize: _Optional[_Union[Finalize, _Mapping]] = ..., depart: _Optional[_Union[Depart, _Mapping]] = ..., fenced: _Optional[_Union[Fenced, _Mapping]] = ..., checkpoint: _Optional[_Union[Checkpoint, _Mapping]] = ..., ask_stacks: _Optional[_Union[AskStacks, _Mapping]] = ..., strike: _Optional[_Union[Strike, _Mapping]] = ...) -> None: ...

class DriverHello(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: str
    def __init__(self, run: _Optional[str] = ...) -> None: ...

class WorkerDied(_message.Message):
    __slots__ = ("worker", "cause")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    worker: str
    cause: str
    def __init__(self, worker: _Optional[str] = ..., cause: _Optional[str] = ...) -> None: ...

class NodeNotice(_message.Message):
    __slots__ = ("node_key", "notice_s", "cause")
    NODE_KEY_FIELD_NUMBER: _ClassVar[int]
    NOTICE_S_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    node_key: str
    notice_s: float
    cause: str
    def __init__(self, node_key: _Optional[str] = ..., notice_s: _Optional[float] = ..., cause: _Optional[str] = ...) -> None: ...

class Injected(_message.Message):
    __slots__ = ("kind", "node_key", "spec")
    KIND_FIELD_NUMBER: _ClassVar[int]
    NODE_KEY_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    kind: str
    node_key: str
    spec: str
    def __init__(self, kind: _Optional[str] = ..., node_key: _Optional[str] = ..., spec: _Optional[str] = ...) -> None: ...

class StopRun(_message.Message):
    __slots__ = ("now", "reason")
    NOW_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    now: bool
    reason: str
    def __init__(self, now: _Optional[bool] = ..., reason: _Optional[str] = ...) -> None: ...

class NodesWanted(_message.Message):
    __slots__ = ("nodes",)
    NODES_FIELD_NUMBER: _ClassVar[int]
    nodes: int
    def __init__(self, nodes: _Optional[int] = ...) -> None: ...

class FromDriver(_message.Message):
    __slots__ = ("driver_hello", "worker_died", "node_notice", "stop_run", "nodes_wanted", "injected")
    DRIVER_HELLO_FIELD_NUMBER: _ClassVar[int]
    WORKER_DIED_FIELD_NUMBER: _ClassVar[int]
    NODE_NOTICE_FIELD_NUMBER: _ClassVar[int]
    STOP_RUN_FIELD_NUMBER: _ClassVar[int]
    NODES_WANTED_FIELD_NUMBER: _ClassVar[int]
    INJECTED_FIELD_NUMBER: _ClassVar[int]
    driver_hello: DriverHello
    worker_died: WorkerDied
    node_notice: NodeNotice
    stop_run: StopRun
    nodes_wanted: NodesWanted
    injected: Injected
    def __init__(self, driver_hello: _Optional[_Union[DriverHello, _Mapping]] = ..., worker_died: _Optional[_Union[WorkerDied, _Mapping]] = ..., node_notice: _Optional[_Union[NodeNotice, _Mapping]] = ..., stop_run: _Optional[_Union[StopRun, _Mapping]] = ..., nodes_wanted: _Optional[_Union[NodesWanted, _Mapping]] = ..., injected: _Optional[_Union[Injected, _Mapping]] = ...) -> None: ...

class Record(_message.Message):
    __slots__ = ("line",)
    LINE_FIELD_NUMBER: _ClassVar[int]
    line: str
    def __init__(self, line: _Optional[str] = ...) -> None: ...

class StartNode(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class KillNode(_message.Message):
    __slots__ = ("node_key", "cause")
    NODE_KEY_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    node_key: str
    cause: str
    def __init__(self, node_key: _Optional[str] = ..., cause: _Optional[str] = ...) -> None: ...

class RunOver(_message.Message):
    __slots__ = ("status", "error", "result")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    status: str
    error: str
    result: str
    def __init__(self, status: _Optional[str] = ..., error: _Optional[str] = ..., result: _Optional[str] = ...) -> None: ...

class KillController(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ToDriver(_message.Message):
    __slots__ = ("record", "start_node", "kill_node", "run_over", "kill_controller")
    RECORD_FIELD_NUMBER: _ClassVar[int]
    START_NODE_FIELD_NUMBER: _ClassVar[int]
    KILL_NODE_FIELD_NUMBER: _ClassVar[int]
    RUN_OVER_FIELD_NUMBER: _ClassVar[int]
    KILL_CONTROLLER_FIELD_NUMBER: _ClassVar[int]
    record: Record
    start_node: StartNode
    kill_node: KillNode
    run_over: RunOver
    kill_controller: KillController
    def __init__(self, record: _Optional[_Union[Record, _Mapping]] = ..., start_node: _Optional[_Union[StartNode, _Mapping]] = ..., kill_node: _Optional[_Union[KillNode, _Mapping]] = ..., run_over: _Optional[_Union[RunOver, _Mapping]] = ..., kill_controller: _Optional[_Union[KillController, _Mapping]] = ...) -> None: ...
