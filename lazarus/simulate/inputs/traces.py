"""Trace files of fleets: Bamboo's ``ms,add|remove,node`` and Parcae's JSON lines.

Adding a node that is present and removing a node that is absent have no effect and are counted
(real traces contain both). Unreadable lines and decreasing times are errors with file and line.
Time 0 is the moment when the first node is added.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lazarus.basics.careful import read_text
from lazarus.errors import ConfigError, Problem

_MOST_PROBLEMS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class FleetEvent:
    """Nodes that join or leave at one moment, in seconds since the first node was added."""

    at_s: float
    kind: str  # "add" or "remove"
    nodes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class FleetTrace:
    """A trace in order of time, with at most one event per moment and kind."""

    name: str
    events: tuple[FleetEvent, ...]
    unknown_removals: int = 0
    repeated_adds: int = 0

    @property
    def length_s(self) -> float:
        """Time of the last event, in seconds."""
        return self.events[-1].at_s if self.events else 0.0

    def nodes_at(self, at_s: float) -> frozenset[str]:
        """Return the nodes present after all events up to ``at_s``."""
        live: set[str] = set()
        for event in self.events:
            if event.at_s > at_s:
                break
            (live.update if event.kind == "add" else live.difference_update)(event.nodes)
        return frozenset(live)


def read_trace(path: str | Path, *, time_scale: float = 1.0) -> FleetTrace:
    """Read a trace file. Each line may be in either format.

    Args:
        path: The trace file.
        time_scale: Factor on all times: 0.1 replays the trace ten times as fast.

    Raises:
        ConfigError: The file or a line cannot be read, times decrease, or no node is ever added.
    """
    if not 0 < time_scale < float("inf"):
        raise ConfigError(f"time scale {time_scale} must be a finite number > 0")
    place = Path(path)
    try:
        lines = read_text(place).split("\n")
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or str(problem)
        raise ConfigError(f"{place}: cannot be read: {reason}") from problem
    return parse_trace(lines, name=str(place), time_scale=time_scale)


def parse_trace(lines: Iterable[str], *, name: str, time_scale: float = 1.0) -> FleetTrace:
    """Parse the lines of a trace; ``name`` is used in errors. See ``read_trace``."""
    problems: list[Problem] = []
    found: list[tuple[float, str, tuple[str, ...]]] = []
    last_ms = 0.0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            ms, kind, nodes = _json_line(line) if line.lstrip()[0] == "[" else _csv_line(line)
            if ms < last_ms:
                raise ValueError(f"time goes backwards: {ms:g} ms after {last_ms:g} ms")
        except ValueError as problem:
            problems.append(Problem(str(problem), where=f"{name}:{number}"))
            if len(problems) >= _MOST_PROBLEMS:
                break
            continue
        last_ms = ms
        if nodes:
            found.append((ms, kind, nodes))
    if problems:
        raise ConfigError(problems)
    if not found:
        raise ConfigError(f"{name}: holds no event; wanted lines such as 60000,remove,node3")
    first_ms = next((ms for ms, kind, _ in found if kind == "add"), None)
    if first_ms is None:
        raise ConfigError(f"{name}: adds no node; wanted lines such as 0,add,node3 first")
    events = [
        FleetEvent(at_s=(ms - first_ms) / 1e3 * time_scale, kind=kind, nodes=nodes)
        for ms, kind, nodes in found
        if ms >= first_ms
    ]
    return _cleaned(name, events, unknown=sum(len(n) for ms, _, n in found if ms < first_ms))


def _csv_line(line: str) -> tuple[float, str, tuple[str, ...]]:
    parts = [part.strip() for part in line.split(",")]
    if len(parts) != 3 or parts[1] not in ("add", "remove") or not parts[2]:
        raise ValueError(f"{line[:60]!r} is not ms,add|remove,node")
    return _milliseconds(parts[0]), parts[1], (parts[2],)


def _json_line(line: str) -> tuple[float, str, tuple[str, ...]]:
    try:
        data = json.loads(line)
    except json.JSONDecodeError as problem:
        raise ValueError(f"not JSON: {problem.msg}") from None
    except RecursionError:
        raise ValueError("not JSON: nested too deeply") from None
    wanted = '[ms, "add"|"remove"|"no-op", {"nodes": [...]}]'
    if not isinstance(data, list) or len(data) != 3 or not isinstance(data[2], dict):
        raise ValueError(f"{line[:60]!r} is not {wanted}")
    ms, kind, more = data
    nodes = more.get("nodes")
    if kind not in ("add", "remove", "no-op") or not isinstance(nodes, list):
        raise ValueError(f"{line[:60]!r} is not {wanted}")
    if not all(isinstance(node, str) for node in nodes):
        raise ValueError("nodes must be names")
    return _milliseconds(ms), kind, tuple(nodes) if kind != "no-op" else ()


def _milliseconds(value: object) -> float:
    try:
        ms = float(value) if isinstance(value, str | int | float) else float("nan")
    except (ValueError, OverflowError):
        ms = float("nan")
    if isinstance(value, bool) or not 0 <= ms < 1e15:
        raise ValueError(f"{repr(value)[:60]} is not a time in milliseconds")
    return ms


def _cleaned(name: str, events: list[FleetEvent], *, unknown: int) -> FleetTrace:
    """Merge events of one moment and kind; count and drop changes without effect."""
    live: set[str] = set()
    repeated = 0
    merged: list[FleetEvent] = []
    for event in events:
        adding = event.kind == "add"
        fresh = tuple(dict.fromkeys(n for n in event.nodes if (n in live) != adding))
        if adding:
            repeated += len(event.nodes) - len(fresh)
            live.update(fresh)
        else:
            unknown += len(event.nodes) - len(fresh)
            live.difference_update(fresh)
        if not fresh:
            continue
        last = merged[-1] if merged else None
        if last is not None and (last.at_s, last.kind) == (event.at_s, event.kind):
            merged[-1] = FleetEvent(at_s=last.at_s, kind=last.kind, nodes=last.nodes + fresh)
        else:
            merged.append(FleetEvent(at_s=event.at_s, kind=event.kind, nodes=fresh))
    return FleetTrace(
        name=name, events=tuple(merged), unknown_removals=unknown, repeated_adds=repeated
    )


def segment(trace: FleetTrace, *, start_s: float, length_s: float, most_nodes: int) -> FleetTrace:
    """Cut a window out of a trace, capped at ``most_nodes`` nodes.

    Nodes above the cap wait, and join when another node leaves.
    """
    waiting = sorted(trace.nodes_at(start_s))
    live, waiting = waiting[:most_nodes], waiting[most_nodes:]
    events = [FleetEvent(at_s=0.0, kind="add", nodes=tuple(live))]
    for event in trace.events:
        if not start_s < event.at_s <= start_s + length_s:
            continue
        at_s = event.at_s - start_s
        if event.kind == "add":
            waiting += [n for n in event.nodes if n not in live]
        else:
            gone = tuple(n for n in event.nodes if n in live)
            waiting = [n for n in waiting if n not in event.nodes]
            live = [n for n in live if n not in event.nodes]
            if gone:
                events.append(FleetEvent(at_s=at_s, kind="remove", nodes=gone))
        new = waiting[: most_nodes - len(live)]
        if new:
            waiting, live = waiting[len(new) :], live + new
            events.append(FleetEvent(at_s=at_s, kind="add", nodes=tuple(new)))
    return FleetTrace(name=f"{trace.name} from {start_s:g} s", events=tuple(events))
