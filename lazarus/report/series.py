"""Convert a run's record to the series that a report draws. Pure functions of the events.

Times are seconds since the run's first event; steps are committed steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lazarus.record.events import Event, moment, of_kind
from lazarus.record.metrics import Summary, committed_steps, summarise

MOST_POINTS = 2_000
_WINDOW = 10  # commits over which throughput is averaged
_MARKED = ("node_lost", "node_left", "node_joined", "expert_restored", "quorum_lost")


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """An event to mark in the charts."""

    at_s: float
    kind: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Holding:
    """The experts of each node under a plan: ``counts[node][expert]`` is a number of layers."""

    at_s: float
    nodes: tuple[int, ...]
    counts: tuple[tuple[int, ...], ...]
    num_layers: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Phases:
    """Duration of one reconfiguration by phase, in seconds."""

    label: str
    phases: Mapping[str, float]
    moves: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RunView:
    """All series of one run's charts."""

    name: str
    summary: Summary
    time_s: tuple[float, ...]
    step: tuple[int, ...]
    loss: tuple[float | None, ...]
    tokens_per_s: tuple[float, ...]
    nodes: tuple[tuple[float, int], ...]
    marks: tuple[Mark, ...]
    phases: tuple[Phases, ...]
    plans: tuple[Holding, ...]
    checkpoint_age: tuple[tuple[float, int], ...]
    settings: Mapping[str, Any] = field(default_factory=dict)


def view_of(events: Sequence[Event], *, name: str) -> RunView:
    """Compute the series of one record; an empty record gives empty series."""
    start = moment(events[0]) if events else 0.0
    commits = sorted(committed_steps(events).values(), key=moment)
    kept = thinned(list(range(len(commits))))
    return RunView(
        name=name,
        summary=summarise(events),
        time_s=tuple(round(moment(commits[i]) - start, 3) for i in kept),
        step=tuple(int(commits[i]["step"]) for i in kept),
        loss=tuple(commits[i]["loss"] for i in kept),
        tokens_per_s=tuple(_speed(commits, i, start) for i in kept),
        nodes=_nodes(events, start),
        marks=_marks(events, start),
        phases=_phases(events, start),
        plans=_plans(events, start),
        checkpoint_age=_ages(events, start),
        settings=dict(next(iter(of_kind(events, "run_started")), {})),
    )


def thinned(items: list[int], most: int = MOST_POINTS) -> list[int]:
    """Return about ``most`` of the items at most, evenly spaced, with the first and the last."""
    if len(items) <= most:
        return items
    stride = -(-len(items) // most)
    return sorted({*items[::stride], items[-1]})


def _speed(commits: Sequence[Event], index: int, start: float) -> float:
    first = max(0, index - _WINDOW)
    since = moment(commits[first]) if index >= _WINDOW else start
    counted = commits[first + 1 : index + 1] if index >= _WINDOW else commits[: index + 1]
    seconds = moment(commits[index]) - since
    return round(sum(int(e["tokens"]) for e in counted) / seconds, 1) if seconds > 0 else 0.0


def _nodes(events: Sequence[Event], start: float) -> tuple[tuple[float, int], ...]:
    """Live nodes over time: a loss counts at once, a joining node with the new generation."""
    live, points = 0, []
    for event in events:
        match event["event"]:
            case "run_started" | "reconfigured" | "step_committed":
                now = int(event["num_nodes"])
            case "node_lost" | "node_left":
                now = live - 1
            case _:
                continue
        if now != live:
            points.append((round(moment(event) - start, 3), now))
            live = now
    if events and points:
        points.append((round(moment(events[-1]) - start, 3), live))
    return tuple(points)


def _marks(events: Sequence[Event], start: float) -> tuple[Mark, ...]:
    return tuple(
        Mark(at_s=round(moment(e) - start, 3), kind=str(e["event"]), text=_said(e))
        for e in of_kind(events, *_MARKED)
    )[:500]


def _said(event: Event) -> str:
    match event["event"]:
        case "node_lost":
            return f"node {event['node']} lost: {event['cause']}"
        case "node_left":
            return f"node {event['node']} left"
        case "node_joined":
            return f"node {event['node']} joined"
        case "expert_restored":
            where = f"L{event['layer']}/E{event['expert']}"
            return f"{where} back from {event['source']}, {event['behind_steps']} steps behind"
        case _:
            return f"below quorum: {event.get('reason', '')}"


def _phases(events: Sequence[Event], start: float) -> tuple[Phases, ...]:
    found = of_kind(events, "reconfigured")[:100]
    return tuple(
        Phases(
            label=f"{moment(e) - start:.1f} s: {_who(e)}",
            phases={str(k): float(v) for k, v in e["phases"].items()},
            moves=int(e["moves"]),
        )
        for e in found
    )


def _who(event: Event) -> str:
    parts = []
    for name, word in (("lost", "lost"), ("joined", "joined")):
        if nodes := event.get(name):
            shown = ", ".join(str(n) for n in nodes[:4]) + (" ..." if len(nodes) > 4 else "")
            parts.append(f"{shown} {word}")
    return "; ".join(parts) or str(event["reason"])


def _plans(events: Sequence[Event], start: float) -> tuple[Holding, ...]:
    found = []
    for event in of_kind(events, "plan_adopted"):
        ranks = event.get("experts_of_rank")
        nodes = [int(n) for n in event.get("nodes", ())]
        if not ranks or not nodes or len(ranks[0]) % len(nodes):
            continue
        found.append(_holding(ranks, nodes, at_s=round(moment(event) - start, 3)))
    return tuple(found)


def _holding(ranks: Sequence[Sequence[Sequence[int]]], nodes: list[int], *, at_s: float) -> Holding:
    """Args: ranks: [layer][rank] -> experts."""
    num_experts = 1 + max((e for layer in ranks for held in layer for e in held), default=0)
    per_node = len(ranks[0]) // len(nodes)
    counts = [[0] * num_experts for _ in nodes]
    for layer in ranks:
        for position in range(len(nodes)):
            held = {
                e for rank in layer[position * per_node : (position + 1) * per_node] for e in rank
            }
            for expert in held:
                counts[position][expert] += 1
    return Holding(
        at_s=at_s,
        nodes=tuple(nodes),
        counts=tuple(tuple(row) for row in counts),
        num_layers=len(ranks),
    )


def _ages(events: Sequence[Event], start: float) -> tuple[tuple[float, int], ...]:
    """Steps since the newest checkpoint over time; empty without checkpoints."""
    newest, step, points = 0, 0, []
    saved = of_kind(events, "checkpoint_persisted")
    if not saved:
        return ()
    for event in of_kind(events, "step_committed", "checkpoint_persisted"):
        at_s = round(moment(event) - start, 3)
        if event["event"] == "checkpoint_persisted":
            points.append((at_s, step - newest))
            newest = int(event["step"])
        else:
            step = int(event["step"])
        points.append((at_s, max(0, step - newest)))
    return tuple(points[i] for i in thinned(list(range(len(points)))))
