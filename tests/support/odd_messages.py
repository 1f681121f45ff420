"""Messages that none of ours would send: every type, every field, real ones bent out of shape."""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import Enum
from random import Random
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec
import numpy as np

from lazarus.control import messages as m
from lazarus.control.cluster.state import Control
from lazarus.failure import Failure

BODIES: Sequence[type[m.Body]] = sorted(
    {t for one in get_args(m.Envelope) for t in get_args(get_type_hints(one)["body"])},
    key=lambda t: t.__name__,
)
_HINTS = {cls: get_type_hints(cls) for cls in (*BODIES, *m.Part.__subclasses__())}
_INTS = (-(1 << 63), -(10**9), -1, 0, 1, 2, 3, 7, 10**6, 1 << 31, 1 << 53, (1 << 63) - 1)
_FLOATS = (float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 1.0, 1e308, 5e-324)
_TEXTS = ("", "0", "x" * 70_000, "\x00", "ключ", "{", "null", "[[[[", "1e999", '{"kind":"persist"}')


def odd_body(rng: Random, state: Control, real: Sequence[m.Body]) -> m.Body:
    """A message made up from its types, or a real one with some fields changed."""
    if real and rng.random() < 0.7:
        kind = (
            type(rng.choice(real))
            if rng.random() < 0.2
            else rng.choice(sorted({type(b) for b in real}, key=str))
        )
        return bent(rng, state, rng.choice([body for body in real if type(body) is kind]))
    cls = rng.choice(BODIES)
    return cls(**{name: _value(rng, state, name, hint) for name, hint in _fields(cls)})


def bent(rng: Random, state: Control, body: m.Body) -> m.Body:
    """A real message with up to three fields changed, and often of the present attempt."""
    changes: dict[str, Any] = {}
    names = dict(_fields(type(body)))
    if "generation" in names and rng.random() < 0.8:
        changes["generation"] = rng.choice([state.generation, state.resumed])
    if "step" in names and rng.random() < 0.6:
        changes["step"] = state.step + rng.randrange(3)
    for name in rng.sample(sorted(names), min(len(names), rng.randrange(4))):
        changes[name] = _changed(rng, state, name, getattr(body, name), names[name])
    return msgspec.structs.replace(body, **changes)


def _fields(cls: Any) -> list[tuple[str, Any]]:
    return [(name, _HINTS[cls][name]) for name in cls.__struct_fields__]


def _changed(rng: Random, state: Control, name: str, value: Any, hint: Any) -> Any:
    """Near the value that it was, or anything of its type."""
    if isinstance(value, bytes) and value and rng.random() < 0.7:
        return _near_bytes(rng, value)
    if isinstance(value, tuple) and value and rng.random() < 0.7:
        return (*value[: rng.randrange(len(value) + 1)], *rng.sample(value, 1) * rng.randrange(3))
    return _value(rng, state, name, hint)


def _near_bytes(rng: Random, value: bytes) -> bytes:
    kind = rng.randrange(4)
    if kind == 0:
        return value[: rng.randrange(len(value))]
    if kind == 1:
        return value + bytes(rng.randrange(64))
    lanes = np.frombuffer(value[: len(value) // 8 * 8], dtype="<f8").copy()
    for _ in range(rng.randrange(1, 4)):
        if lanes.size:
            at = (
                rng.randrange(min(lanes.size, 12))
                if rng.random() < 0.7
                else rng.randrange(lanes.size)
            )
            lanes[at] = rng.choice([*_FLOATS, 1e18, 0.5, 2.0])
    return lanes.tobytes()


def _value(rng: Random, state: Control, name: str, hint: Any) -> Any:
    kinds = get_args(hint)
    if hint is int:
        near = [state.generation, state.resumed, state.step, state.step + 1, state.config.steps]
        return rng.choice([*_INTS, *near, *near])
    if hint is bool:
        return rng.random() < 0.5
    if hint is float:
        return rng.choice(_FLOATS)
    if hint is bytes:
        return (
            rng.randbytes(rng.choice([0, 1, 7, 8, 80, 800])) if rng.random() < 0.5 else _lanes(rng)
        )
    if hint is str:
        return rng.choice(
            [*_TEXTS, *state.roster.workers, *state.storage.bad_sources, nested_json(rng)]
        )
    if hint in _HINTS:
        return hint(**{field: _value(rng, state, field, of) for field, of in _fields(hint)})
    if get_origin(hint) is Literal:
        return rng.choice(kinds)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return rng.choice([*hint])
    if Failure in kinds or hint is Failure:
        return Failure(cause="internal", message="odd")  # type: ignore[arg-type]
    if kinds and kinds[-1] is Ellipsis:
        count = rng.choice([0, 1, 2, 5])
        return tuple(_value(rng, state, name, kinds[0]) for _ in range(count))
    if kinds and type(None) in kinds:
        return None
    if kinds and hasattr(hint, "__origin__") and hint.__origin__ is tuple:
        return tuple(_value(rng, state, name, kind) for kind in kinds)
    raise AssertionError(f"no odd value for {name}: {hint}")


def _lanes(rng: Random) -> bytes:
    count = rng.choice([1, 10, 14, 20, 40])
    return np.array([rng.choice([*_FLOATS, 2.0, 4.0]) for _ in range(count)]).tobytes()


def nested_json(rng: Random) -> str:
    """Valid JSON of odd shapes, also nested too deep to be read."""
    depth = rng.choice([1, 15, 17, 900, 100_000])
    inner: Any = rng.choice(_odd_records())
    if depth > 1:
        return '{"a":' * depth + json.dumps(inner) + "}" * depth
    return json.dumps(inner)


def _odd_records() -> list[Any]:
    nan = float("nan")
    rates = {"copy_rate": 0, "write_rate": -1, "window_s": nan}
    return [
        1,
        None,
        [],
        {"kind": "persist", "ok": True, "measured": rates},
        {"kind": "persist", "ok": True, "measured": {"x": 1}},
        {"kind": "persist", "ok": True, "files": 3},
        {"kind": 7, "ok": "yes"},
        {"kind": "copy", "ok": True},
        {"kind": "snapshot", "ok": False, "error": ["x"]},
        {"data": 3},
        {"data": {"num_samples": "many"}},
        {"data": {"num_samples": nan}},
        {"layer": 0, "expert": 1, "event": "run_finished", "t": 0},
        {"layer": "a", "expert": None},
        {"layer": 0, "expert": 10**400},
    ]
