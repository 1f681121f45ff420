"""The folded state: one JSON object that a restart reads instead of the journal's entries. PURE.

The object has every field of the replayed state that differs from a blank state, and so everything
that ``replay.replayed`` sets.
"""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Mapping
from enum import Enum
from types import ModuleType
from typing import Any

import numpy as np

from lazarus.checkpoint.restoring import plt, restore_choice
from lazarus.checkpoint.selection import adaptive
from lazarus.control import messages, ports
from lazarus.control.cluster.state import Control, ControlConfig, fields_of, with_fields
from lazarus.control.parts import agreement, roster, saving
from lazarus.control.restart.replay import blank_state
from placement import Plan, rebalance

_ROOMS: tuple[ModuleType, ...] = (
    *(roster, saving, agreement),
    *(messages, ports, restore_choice, adaptive, plt, rebalance),
)
_KIND = "~"  # marks a JSON object that stands for something else
_AS_PLAN = "as plan"  # stands for ``base_plan`` if it is the same object as ``plan``


Known = dict[str, tuple[Any, str]]  # field name -> its value and the text of the value


def folded_text(replayed: Control, *, known: Known) -> str:
    """Write a replayed state as the text of a JSON object, which ``unfolded`` reads.

    Args:
        replayed: The state.
        known: A cache, filled by earlier calls. A field that is still the same object is not
            encoded again, for example the plan of a thousand ranks.
    """
    blank = fields_of(blank_state(replayed.config))
    parts = []
    for name, value in fields_of(replayed).items():
        if name == "config" or _same(value, blank[name]):
            continue
        if name == "base_plan" and value is replayed.standing.plan:
            text = json.dumps(_AS_PLAN)
        elif name in known and known[name][0] is value:
            text = known[name][1]
        else:
            text = json.dumps(_put(value), separators=(",", ":"))
            known[name] = (value, text)
        parts.append(f'"{name}":{text}')
    return "{" + ",".join(parts) + "}"


def unfolded(data: Mapping[str, Any], config: ControlConfig) -> Control:
    """Read a state from the JSON object that ``folded_text`` wrote.

    Raises:
        ValueError: The object was not written by ``folded_text``.
    """
    try:
        fields = {name: _get(item) for name, item in data.items()}
        if data.get("base_plan") == _AS_PLAN:
            fields["base_plan"] = fields["plan"]
        return with_fields(blank_state(config), fields)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no folded state: {type(error).__name__}: {error}") from error


def _same(value: Any, other: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.shape == other.shape and not value.size
    return value is other or bool(value == other)


def _put(value: Any) -> Any:
    match value:
        case None | bool() | int() | float() | str() if not isinstance(value, Enum):
            return value
        case tuple():
            return [_put(item) for item in value]
        case bytes():
            return {_KIND: "bytes", "v": base64.b64encode(value).decode()}
        case Mapping():
            return {_KIND: "map", "v": [[_put(k), _put(v)] for k, v in value.items()]}
        case frozenset():
            return {_KIND: "set", "v": sorted((_put(item) for item in value), key=repr)}
        case np.ndarray():
            packed = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
            return {_KIND: "array", "of": value.dtype.str, "shape": [*value.shape], "v": packed}
    names = _names(type(value))
    return {_KIND: type(value).__name__, "v": [_put(getattr(value, name)) for name in names]}


def _get(item: Any) -> Any:
    if isinstance(item, list):
        return tuple(_get(part) for part in item)
    if not isinstance(item, dict):
        return item
    value = item["v"]
    match item[_KIND]:
        case "bytes":
            return base64.b64decode(value)
        case "map":
            return {_get(k): _get(v) for k, v in value}
        case "set":
            return frozenset(_get(part) for part in value)
        case "array":
            flat = np.frombuffer(base64.b64decode(value), dtype=item["of"])
            return flat.reshape(item["shape"])
        case name:
            kind = _class(name)
            parts = (_get(part) for part in value)
            return kind(**dict(zip(_names(kind), parts, strict=True)))


def _names(kind: type) -> tuple[str, ...]:
    """Names of the fields of a dataclass or struct that a state may contain."""
    if kind is not _class(kind.__name__):
        raise TypeError(f"a folded state cannot hold {kind.__qualname__}")
    if dataclasses.is_dataclass(kind):
        return tuple(field.name for field in dataclasses.fields(kind) if field.init)
    return tuple(kind.__struct_fields__)


def _class(name: str) -> Any:
    if name == Plan.__name__:
        return Plan
    for room in _ROOMS:
        if isinstance(kind := getattr(room, name, None), type):
            return kind
    raise TypeError(f"no record type {name!r}")
