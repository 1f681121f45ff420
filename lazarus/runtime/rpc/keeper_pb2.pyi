from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Stamp(_message.Message):
    __slots__ = ("job", "term", "generation")
    JOB_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    job: str
    term: int
    generation: int
    def __init__(self, job: _Optional[str] = ..., term: _Optional[int] = ..., generation: _Optional[int] = ...) -> None: ...

class Key(_message.Message):
    __slots__ = ("layer", "expert", "step", "generation", "routed", "parts")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    ROUTED_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    layer: int
    expert: int
    step: int
    generation: int
    routed: int
    parts: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, layer: _Optional[int] = ..., expert: _Optional[int] = ..., step: _Optional[int] = ..., generation: _Optional[int] = ..., routed: _Optional[int] = ..., parts: _Optional[_Iterable[str]] = ...) -> None: ...

class Reserve(_message.Message):
    __slots__ = ("ticket", "stamp", "keys", "num_bytes", "published_step")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    STAMP_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_STEP_FIELD_NUMBER: _ClassVar[int]
    ticket: int
    stamp: Stamp
    keys: _containers.RepeatedCompositeFieldContainer[Key]
    num_bytes: _containers.RepeatedScalarFieldContainer[int]
    published_step: int
    def __init__(self, ticket: _Optional[int] = ..., stamp: _Optional[_Union[Stamp, _Mapping]] = ..., keys: _Optional[_Iterable[_Union[Key, _Mapping]]] = ..., num_bytes: _Optional[_Iterable[int]] = ..., published_step: _Optional[int] = ...) -> None: ...

class Target(_message.Message):
    __slots__ = ("index", "addresses")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    index: int
    addresses: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, index: _Optional[int] = ..., addresses: _Optional[_Iterable[str]] = ...) -> None: ...

class Seal(_message.Message):
    __slots__ = ("ticket", "copies", "persist", "url")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    COPIES_FIELD_NUMBER: _ClassVar[int]
    PERSIST_FIELD_NUMBER: _ClassVar[int]
    URL_FIELD_NUMBER: _ClassVar[int]
    ticket: int
    copies: _containers.RepeatedCompositeFieldContainer[Target]
    persist: _containers.RepeatedScalarFieldContainer[int]
    url: str
    def __init__(self, ticket: _Optional[int] = ..., copies: _Optional[_Iterable[_Union[Target, _Mapping]]] = ..., persist: _Optional[_Iterable[int]] = ..., url: _Optional[str] = ...) -> None: ...

class Abandon(_message.Message):
    __slots__ = ("ticket",)
    TICKET_FIELD_NUMBER: _ClassVar[int]
    ticket: int
    def __init__(self, ticket: _Optional[int] = ...) -> None: ...

class FromTrainer(_message.Message):
    __slots__ = ("reserve", "seal", "abandon")
    RESERVE_FIELD_NUMBER: _ClassVar[int]
    SEAL_FIELD_NUMBER: _ClassVar[int]
    ABANDON_FIELD_NUMBER: _ClassVar[int]
    reserve: Reserve
    seal: Seal
    abandon: Abandon
    def __init__(self, reserve: _Optional[_Union[Reserve, _Mapping]] = ..., seal: _Optional[_Union[Seal, _Mapping]] = ..., abandon: _Optional[_Union[Abandon, _Mapping]] = ...) -> None: ...

class Place(_message.Message):
    __slots__ = ("segment", "offset")
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    segment: int
    offset: int
    def __init__(self, segment: _Optional[int] = ..., offset: _Optional[int] = ...) -> None: ...

class Segment(_message.Message):
    __slots__ = ("id", "fd", "num_bytes")
    ID_FIELD_NUMBER: _ClassVar[int]
    FD_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    id: int
    fd: int
    num_bytes: int
    def __init__(self, id: _Optional[int] = ..., fd: _Optional[int] = ..., num_bytes: _Optional[int] = ...) -> None: ...

class Reserved(_message.Message):
    __slots__ = ("ticket", "places", "segments", "pid", "error")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    PLACES_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    ticket: int
    places: _containers.RepeatedCompositeFieldContainer[Place]
    segments: _containers.RepeatedCompositeFieldContainer[Segment]
    pid: int
    error: str
    def __init__(self, ticket: _Optional[int] = ..., places: _Optional[_Iterable[_Union[Place, _Mapping]]] = ..., segments: _Optional[_Iterable[_Union[Segment, _Mapping]]] = ..., pid: _Optional[int] = ..., error: _Optional[str] = ...) -> None: ...

class Done(_message.Message):
    __slots__ = ("ticket", "record")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    RECORD_FIELD_NUMBER: _ClassVar[int]
    ticket: int
    record: str
    def __init__(self, ticket: _Optional[int] = ..., record: _Optional[str] = ...) -> None: ...

class ToTrainer(_message.Message):
    __slots__ = ("reserved", "done")
    RESERVED_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    reserved: Reserved
    done: Done
    def __init__(self, reserved: _Optional[_Union[Reserved, _Mapping]] = ..., done: _Optional[_Union[Done, _Mapping]] = ...) -> None: ...

class RecordHead(_message.Message):
    __slots__ = ("stamp", "key", "num_bytes", "checksum", "published_step")
    STAMP_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_STEP_FIELD_NUMBER: _ClassVar[int]
    stamp: Stamp
    key: Key
    num_bytes: int
    checksum: str
    published_step: int
    def __init__(self, stamp: _Optional[_Union[Stamp, _Mapping]] = ..., key: _Optional[_Union[Key, _Mapping]] = ..., num_bytes: _Optional[int] = ..., checksum: _Optional[str] = ..., published_step: _Optional[int] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("head", "data")
    HEAD_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    head: RecordHead
    data: bytes
    def __init__(self, head: _Optional[_Union[RecordHead, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class PushReply(_message.Message):
    __slots__ = ("accepted", "reason")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    accepted: bool
    reason: str
    def __init__(self, accepted: _Optional[bool] = ..., reason: _Optional[str] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("stamp", "layer", "expert", "generation", "step")
    STAMP_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    stamp: Stamp
    layer: int
    expert: int
    generation: int
    step: int
    def __init__(self, stamp: _Optional[_Union[Stamp, _Mapping]] = ..., layer: _Optional[int] = ..., expert: _Optional[int] = ..., generation: _Optional[int] = ..., step: _Optional[int] = ...) -> None: ...

class InventoryRequest(_message.Message):
    __slots__ = ("stamp",)
    STAMP_FIELD_NUMBER: _ClassVar[int]
    stamp: Stamp
    def __init__(self, stamp: _Optional[_Union[Stamp, _Mapping]] = ...) -> None: ...

class Held(_message.Message):
    __slots__ = ("key", "num_bytes", "checksum")
    KEY_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    key: Key
    num_bytes: int
    checksum: str
    def __init__(self, key: _Optional[_Union[Key, _Mapping]] = ..., num_bytes: _Optional[int] = ..., checksum: _Optional[str] = ...) -> None: ...

class InventoryReply(_message.Message):
    __slots__ = ("held", "reserved_bytes", "peak_bytes", "stale_messages", "pid")
    HELD_FIELD_NUMBER: _ClassVar[int]
    RESERVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    STALE_MESSAGES_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    held: _containers.RepeatedCompositeFieldContainer[Held]
    reserved_bytes: int
    peak_bytes: int
    stale_messages: int
    pid: int
    def __init__(self, held: _Optional[_Iterable[_Union[Held, _Mapping]]] = ..., reserved_bytes: _Optional[int] = ..., peak_bytes: _Optional[int] = ..., stale_messages: _Optional[int] = ..., pid: _Optional[int] = ...) -> None: ...

class Resumed(_message.Message):
    __slots__ = ("generation", "step")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    generation: int
    step: int
    def __init__(self, generation: _Optional[int] = ..., step: _Optional[int] = ...) -> None: ...

class Drop(_message.Message):
    __slots__ = ("layer", "expert", "generation", "step")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    layer: int
    expert: int
    generation: int
    step: int
    def __init__(self, layer: _Optional[int] = ..., expert: _Optional[int] = ..., generation: _Optional[int] = ..., step: _Optional[int] = ...) -> None: ...

class Order(_message.Message):
    __slots__ = ("stamp", "lineage", "resume_step", "drops", "leave")
    STAMP_FIELD_NUMBER: _ClassVar[int]
    LINEAGE_FIELD_NUMBER: _ClassVar[int]
    RESUME_STEP_FIELD_NUMBER: _ClassVar[int]
    DROPS_FIELD_NUMBER: _ClassVar[int]
    LEAVE_FIELD_NUMBER: _ClassVar[int]
    stamp: Stamp
    lineage: _containers.RepeatedCompositeFieldContainer[Resumed]
    resume_step: int
    drops: _containers.RepeatedCompositeFieldContainer[Drop]
    leave: bool
    def __init__(self, stamp: _Optional[_Union[Stamp, _Mapping]] = ..., lineage: _Optional[_Iterable[_Union[Resumed, _Mapping]]] = ..., resume_step: _Optional[int] = ..., drops: _Optional[_Iterable[_Union[Drop, _Mapping]]] = ..., leave: _Optional[bool] = ...) -> None: ...

class OrderReply(_message.Message):
    __slots__ = ("accepted", "dropped")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    accepted: bool
    dropped: int
    def __init__(self, accepted: _Optional[bool] = ..., dropped: _Optional[int] = ...) -> None: ...
