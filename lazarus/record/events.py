"""The events of a run's record: ``events.jsonl``, one JSON object per line, and their fields.

Every event has ``t`` (unix seconds), ``event`` (its name) and ``generation``. Runs also write
``m``, the seconds that the run has been alive on a monotonic clock; durations are differences of
``m`` (see ``moment``). Readers ignore unknown fields and events, so new ones may be added; fields
listed here must not be removed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lazarus.basics.careful import lines_of, open_regular, parse_object
from lazarus.errors import RecordError

SCHEMA = 1  # written into run_started
FILE_NAME = "events.jsonl"

Event = Mapping[str, Any]

_INT = (int,)
_NUMBER = (int, float)
_TEXT = (str,)
_NODE = (int, type(None))
_LOSS = (int, float, type(None))  # null: not a finite number
_HEADER: Mapping[str, tuple[type, ...]] = MappingProxyType(
    {"t": _NUMBER, "event": _TEXT, "generation": _INT}
)
# Fields that an event always has, in addition to the header. Events may have further fields.
FIELDS: Mapping[str, Mapping[str, tuple[type, ...]]] = MappingProxyType(
    {
        "run_started": {"num_nodes": _INT, "world_size": _INT, "schema": _INT},
        "run_resumed": {},
        "step_committed": {
            "step": _INT,
            "loss": _LOSS,
            "tokens": _INT,
            "num_nodes": _INT,
            "wall_s": _NUMBER,
        },
        "fault_injected": {"node": _NODE, "kind": _TEXT, "step": _INT},
        "fault_not_fired": {"spec": _TEXT, "reason": _TEXT},
        "node_lost": {"node": _INT, "cause": _TEXT},
        "node_left": {"node": _INT},
        "node_joined": {"node": _INT},
        "drain_notice": {"node": _INT},
        "nodes_awaited": {"missing": _INT, "reason": _TEXT},
        "machine_suspect": {"machine": _TEXT, "reason": _TEXT},
        "node_banned": {"machine": _TEXT, "reason": _TEXT},
        "reconfigured": {
            "reason": _TEXT,
            "wall_s": _NUMBER,
            "phases": (dict,),
            "num_nodes": _INT,
            "moves": _INT,
            "bytes_moved": _INT,
        },
        "plan_adopted": {"digest": _TEXT},
        "plan_fallback": {"reason": _TEXT},
        "quorum_lost": {"reason": _TEXT},
        "quorum_regained": {},
        "rolled_back": {"step": _INT},
        "run_restarted": {"step": _INT, "from_step": _INT, "checkpoint": _TEXT},
        "expert_restored": {
            "layer": _INT,
            "expert": _INT,
            "source": _TEXT,
            "behind_steps": _INT,
            "lost_copies": _NUMBER,
        },
        "checkpoint_persisted": {"step": _INT, "bytes": _INT, "wall_s": _NUMBER},
        "checkpoint_adapted": {
            "step": _INT,
            "k_snapshot": _INT,
            "snapshot_every": _INT,
            "persist_every": _INT,
        },
        "checkpoint_failed": {"step": _INT, "reason": _TEXT},
        "rank_slow": {"rank": _INT, "slowdown": _NUMBER},
        "ledger": {"step": _INT, "sample_ids": (list,)},
        "ledger_mismatch": {"step": _INT, "samples": _INT, "expected": _INT},
        "evaluated": {"step": _INT, "loss": _LOSS},
        "message_refused": {"worker": _TEXT, "message": _TEXT, "reason": _TEXT},
        "state_digest": {"step": _INT, "digest": _TEXT},
        "replica_mismatch": {"layer": _INT, "expert": _INT},
        "replica_repaired": {
            "step": _INT,
            "what": _TEXT,
            "layer": _INT,
            "expert": _INT,
            "rank": _INT,
            "node": _INT,
        },
        "node_suspect": {"node": _INT, "times": _INT, "reason": _TEXT},
        "callback_failed": {"callback": _TEXT, "error": _TEXT},
        "user_error": {
            "where": _TEXT,
            "error": _TEXT,
            "node": _INT,
            "rank": _INT,
            "step": _INT,
            "phase": _TEXT,
            "sample_ids": (list,),
        },
        "internal_error": {"error": _TEXT, "node": _INT, "step": _INT},
        "worker_died": {"worker": _TEXT, "cause": _TEXT, "step": _INT, "phase": _TEXT},
        "step_skipped": {"step": _INT, "reason": _TEXT},
        "collective_stalled": {"step": _INT, "where": _TEXT, "nodes": (list,)},
        "run_finished": {
            "status": _TEXT,
            "cause": _TEXT,
            "steps": _INT,
            "wall_s": _NUMBER,
            "goodput_tokens_per_s": _NUMBER,
            "ettr": _NUMBER,
            "plt": _NUMBER,
        },
    }
)

# Fields that records of earlier versions may lack.
_LATER: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "run_started": ("schema",),
        "run_finished": ("status", "cause", "goodput_tokens_per_s", "ettr", "plt"),
        "rank_slow": ("rank",),
        "user_error": ("where", "node", "rank", "step", "phase", "sample_ids"),
        "replica_mismatch": ("layer", "expert"),
    }
)
_LATEST_S = 1e11  # larger values of ``t`` and ``m`` are refused
_ODD = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, AssertionError)


def faults_of(event: Event) -> list[str]:
    """One text for each missing field and each field of the wrong type.

    Of an unknown event, only the header is checked.
    """
    wanted = {**_HEADER, **FIELDS.get(str(event.get("event")), {})}
    wrong = []
    for name, types in wanted.items():
        if name not in event:
            wrong.append(f"field {name} is missing")
        elif not _is(event[name], types):
            kinds = " or ".join(kind.__name__ for kind in types)
            wrong.append(f"{name} = {event[name]!r} must be {kinds}")
    return wrong


def encode(event: Event) -> str:
    """Encode an event as a line of the record, with its line end. NaN and infinity become null."""
    return json.dumps(_finite(event), separators=(", ", ": "), allow_nan=False) + "\n"


def decode(line: str) -> dict[str, Any]:
    """Decode one line of the record.

    Raises:
        ValueError: The line is no JSON object with ``t``, ``event`` and ``generation``, or a field
            of a known event is missing or of the wrong type.
    """
    event = parse_object(line)
    for name, types in _HEADER.items():
        if not _is(event.get(name), types):
            raise ValueError(f"{name} = {_short(event.get(name))} must be {types[0].__name__}")
    for name in ("t", "m"):
        if not _is(event.get(name, 0), _NUMBER) or abs(event.get(name, 0)) > _LATEST_S:
            raise ValueError(f"{name} = {_short(event[name])} is no time")
    if wrong := [text for text in faults_of(event) if not _came_later(event, text)]:
        raise ValueError(f"{event['event']}: {wrong[0]}")
    return event


def _came_later(event: Event, fault: str) -> bool:
    """Whether the fault is a missing field that records of earlier versions may lack."""
    later = _LATER.get(str(event["event"]), ())
    return any(fault == f"field {name} is missing" for name in later)


def _short(value: Any) -> str:
    return repr(value)[:40]


def read_events(path: str | Path) -> list[dict[str, Any]]:
    """All events of a record: ``path`` is the file, or the run's folder. See ``each_event``."""
    return list(each_event(path))


def each_event(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the events of a record one by one, without holding all of them in memory.

    A last line without a line end is ignored: the run ended while the line was being written.

    Args:
        path: The record's file, or the run's folder.

    Raises:
        RecordError: The file cannot be read, or a line is damaged; with the line's number.
    """
    place = Path(path)
    place = place / FILE_NAME if place.is_dir() else place
    number = 0  # of the present line
    try:
        with open_regular(place) as file:
            for _, line in lines_of(file):
                number += 1
                if line.strip():
                    yield decode_bytes(line)
    except OSError as error:
        reason = error.strerror or str(error)
        raise RecordError(path=str(place), line=0, reason=f"cannot be read: {reason}") from error
    except ValueError as error:
        raise RecordError(path=str(place), line=number, reason=str(error)) from error


@contextmanager
def blamed_on_record(path: str | Path) -> Iterator[None]:
    """Turn errors of code that uses events into a RecordError: the record must be damaged.

    Raises:
        RecordError: The code in this context raised, for example, a KeyError or TypeError.
    """
    place = Path(path)
    try:
        yield
    except RecordError:
        raise
    except _ODD as error:
        place = place / FILE_NAME if place.is_dir() else place
        reason = f"an event makes no sense: {type(error).__name__}: {error}"[:200]
        raise RecordError(path=str(place), line=0, reason=reason.replace("\n", " ")) from error


def decode_bytes(line: bytes) -> dict[str, Any]:
    """Decode one line of the record from bytes.

    Raises:
        ValueError: See ``decode``; or the line is not UTF-8.
    """
    try:
        return decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start + 1} of the line is no UTF-8") from None


def moment(event: Event) -> float:
    """The time of an event in seconds, only for differences: ``m``, or ``t`` in old records."""
    return float(event.get("m", event.get("t", 0.0)))


def of_kind(events: Iterable[Event], *names: str) -> list[Event]:
    """The events with one of these names, in order."""
    return [event for event in events if event["event"] in names]


def _is(value: Any, types: tuple[type, ...]) -> bool:
    if isinstance(value, bool):
        return bool in types
    return isinstance(value, types)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value
