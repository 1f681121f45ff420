"""Encodes messages as msgpack and decodes them, for the controller and the keepers.

Message classes define the format. Bytes that do not fit the expected class are refused; decoding
never runs code from a message.
"""

from __future__ import annotations

from functools import cache
from typing import Any, TypeVar, cast

import msgspec
import numpy as np

Message = TypeVar("Message")


def _plain(value: Any) -> Any:
    """Convert a NumPy scalar to a Python number.

    Raises:
        TypeError: ``value`` is of another type.
    """
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be sent")


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_plain)


def encode(message: Any) -> bytes:
    """Encode a message. Text that UTF-8 cannot hold (an odd file name) is escaped."""
    try:
        return _ENCODER.encode(message)
    except UnicodeEncodeError:
        return _ENCODER.encode(_escaped(_builtins(message)))


def decode(kind: type[Message], data: bytes) -> Message:
    """Decode bytes as a message of class ``kind``.

    Raises:
        ValueError: The bytes are not such a message.
    """
    try:
        return cast(Message, _decoder(cast(Any, kind)).decode(data))
    except (ValueError, RecursionError) as problem:
        name = getattr(kind, "__name__", str(kind))
        raise ValueError(f"no {name}: {problem}; the peers run different versions") from problem


@cache
def _decoder(kind: Any) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(kind)


def _builtins(message: Any) -> Any:
    return msgspec.to_builtins(message, builtin_types=(bytes, memoryview), enc_hook=_plain)


def _escaped(value: Any) -> Any:
    """Copy plain data, with backslash escapes for characters that UTF-8 cannot hold."""
    match value:
        case str():
            return value.encode("utf-8", "backslashreplace").decode()
        case dict():
            return {_escaped(key): _escaped(item) for key, item in value.items()}
        case list() | tuple():
            return [_escaped(item) for item in value]
    return value
