"""Control records to protobuf and back, by field name.

The wire carries protobuf alone; a message that does not decode is refused, never evaluated.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Hashable
from functools import cache
from typing import Any, cast

from google.protobuf.message import Message

from lazarus.control import messages
from lazarus.control.messages import Body
from lazarus.runtime.rpc import lazarus_pb2 as pb


@cache
def _nested(record_type: Hashable) -> dict[str, type]:
    """Fields of a record that hold tuples of other records."""
    hints = typing.get_type_hints(cast(Any, record_type))
    nested: dict[str, type] = {}
    for name, hint in hints.items():
        if typing.get_origin(hint) is tuple:
            inner = typing.get_args(hint)[0]
            plain = isinstance(inner, type) and not isinstance(inner, types.GenericAlias)
            if plain and issubclass(inner, Body):
                nested[name] = inner
    return nested


@cache
def _names(record_type: Hashable) -> tuple[str, ...]:
    return tuple(f.name for f in dataclasses.fields(cast(Any, record_type)))


def to_message(record: Body) -> Message:
    """The protobuf message of a record."""
    cls = type(record)
    message: Message = getattr(pb, cls.__name__)()
    nested = _nested(cast(Hashable, cls))
    for name in _names(cast(Hashable, cls)):
        value = getattr(record, name)
        if name in nested:
            getattr(message, name).extend(to_message(item) for item in value)
        elif isinstance(value, tuple):
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)
    return message


def from_message(message: Message) -> Body:
    """The record of a protobuf message.

    Raises:
        ValueError: No record of that name exists.
    """
    name = type(message).__name__
    cls = getattr(messages, name, None)
    if cls is None or not issubclass(cls, Body):
        raise ValueError(f"message {name} has no record; the peers run different versions")
    nested = _nested(cast(Hashable, cls))
    values: dict[str, Any] = {}
    for field in _names(cast(Hashable, cls)):
        value = getattr(message, field)
        if field in nested:
            values[field] = tuple(from_message(item) for item in value)
        elif not isinstance(value, str | bytes | int | float | bool):
            values[field] = tuple(value)
        else:
            values[field] = value
    record: Body = cls(**values)
    return record


@cache
def _slots(envelope: Hashable) -> dict[str, str]:
    """Message name -> name of the slot in the envelope's ``body``."""
    descriptor = envelope.DESCRIPTOR  # type: ignore[attr-defined]
    return {f.message_type.name: f.name for f in descriptor.oneofs_by_name["body"].fields}


def wrap(envelope: type[Any], record: Body, **fields: Any) -> Any:
    """Put a record into an envelope (FromWorker, ToWorker, FromDriver, ToDriver)."""
    slot = _slots(cast(Hashable, envelope))[type(record).__name__]
    result = envelope(**fields)
    getattr(result, slot).CopyFrom(to_message(record))
    return result


def unwrap(envelope: Any) -> Body:
    """The record inside an envelope.

    Raises:
        ValueError: The envelope is empty or of a newer version.
    """
    slot = envelope.WhichOneof("body")
    if slot is None:
        raise ValueError("empty control message; the peers run different versions")
    return from_message(getattr(envelope, slot))
