"""Values of settings: their types, and their notation in TOML, in JSON and in messages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

_NONE = "none"  # clears an optional key, since TOML has no null


def type_text(hint: Any) -> str:
    """A type as text for the reference page and messages."""
    origin = get_origin(hint)
    if origin is Literal:
        return " | ".join(f'"{a}"' for a in get_args(hint))
    if origin in (Union, UnionType):
        return " | ".join(type_text(a) for a in get_args(hint))
    if hint is NoneType:
        return f'"{_NONE}"'
    if origin is tuple:
        inner = get_args(hint)
        if inner[-1] is Ellipsis:
            return f"list of {type_text(inner[0])}"
        return f"list of {len(inner)} {type_text(inner[0])}"
    if origin is not None:
        return "table"
    return str(hint.__name__)


def toml_value(value: Any) -> str:
    """A value in TOML's notation, on one line."""
    if value is None:
        return f'"{_NONE}"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, Mapping):
        inner = ", ".join(f"{_quoted(k)} = {toml_value(v)}" for k, v in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(toml_value(v) for v in value)}]"
    return repr(value) if isinstance(value, int | float) else _quoted(str(value))


def _quoted(text: str) -> str:
    """A TOML basic string: JSON's notation, but no surrogate pairs, and no raw DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def jsonable(value: Any) -> Any:
    """Convert tuples to lists and mappings to dictionaries."""
    if isinstance(value, tuple):
        return [jsonable(v) for v in value]
    return dict(value) if isinstance(value, Mapping) else value


def normal(value: Any, hint: Any) -> Any:
    """Convert a TOML or JSON value to the type that the dataclass holds."""
    if value is None or (value == _NONE and NoneType in _members(hint)):
        return None
    if isinstance(value, list):
        inner = [get_args(m)[0] for m in _members(hint) if get_origin(m) is tuple]
        return tuple(normal(v, inner[0]) if inner else v for v in value)
    if type(value) is int and float in _members(hint) and int not in _members(hint):
        return float(value)
    return value


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def literals(hint: Any) -> list[Any]:
    """The values that the ``Literal`` types of a hint allow."""
    return [a for m in _members(hint) if get_origin(m) is Literal for a in get_args(m)]


def conforms(value: Any, hint: Any) -> bool:
    """Whether a value is of a type, as annotations of settings use them."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return any(conforms(value, member) for member in get_args(hint))
    if origin is Literal:
        return value in get_args(hint) and isinstance(value, str)
    if origin is tuple:
        inner = get_args(hint)
        if not isinstance(value, tuple):
            return False
        if inner[-1] is Ellipsis:
            return all(conforms(v, inner[0]) for v in value)
        return len(value) == len(inner) and all(map(conforms, value, inner))
    if origin is not None:  # Mapping[str, str]
        return isinstance(value, Mapping) and all(
            isinstance(k, str) and isinstance(v, str) for k, v in value.items()
        )
    if hint is float:
        finite = isinstance(value, float | int) and abs(value) < float("inf")
        return finite and not isinstance(value, bool)
    return type(value) is hint


def is_text(value: str) -> bool:
    """Whether a string is valid UTF-8 without NUL; strings of the command line may not be."""
    try:
        return b"\0" not in value.encode("utf-8")
    except UnicodeEncodeError:
        return False
