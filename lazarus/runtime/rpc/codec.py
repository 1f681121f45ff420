"""Messages to msgpack and back. A message that does not fit its class is refused, never evaluated.

One function writes, one reads, for the control plane and the keepers alike; the classes say all.
"""

from __future__ import annotations

from functools import cache
from typing import Any, TypeVar, cast

import msgspec
import numpy as np

Message = TypeVar("Message")


def _plain(value: Any) -> Any:
    """NumPy's numbers as Python's.

    Raises:
        TypeError: Anything else that msgpack does not know.
    """
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be sent")


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_plain)


def encode(message: Any) -> bytes:
    """A message as bytes. Text that is not Unicode (an odd file name) goes escaped."""
    try:
        return _ENCODER.encode(message)
    except UnicodeEncodeError:
        return _ENCODER.encode(_escaped(_builtins(message)))


def decode(kind: type[Message], data: bytes) -> Message:
    """The message in these bytes.

    Raises:
        ValueError: They hold no such message.
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
    """Plain data in which every text can be written as UTF-8."""
    match value:
        case str():
            return value.encode("utf-8", "backslashreplace").decode()
        case dict():
            return {_escaped(key): _escaped(item) for key, item in value.items()}
        case list() | tuple():
            return [_escaped(item) for item in value]
    return value
