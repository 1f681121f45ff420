"""Goodput, ETTR, PLT and recoveries as pure functions of a run's events.

A record may have several *lives*: each resume adds another ``run_started``. The time between two
lives does not count as wall time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lazarus.record.events import Event, moment, of_kind

# Kinds of faults after which the node is lost.
_LETHAL = frozenset({"kill", "stop", "cut", "leave", "stall"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Recovery:
    """The loss of a node and the recovery. Times in seconds; None if the record lacks them."""

    node: int
    cause: str
    step: int  # the step in progress when the node was lost
    detect_s: float | None  # from the injected fault to ``node_lost``
    rebuild_s: float  # duration of the reconfiguration
    back_s: float | None  # from the fault (without one: ``node_lost``) to the next committed step
    steps_lost: int  # committed steps that had to be computed again
    moves: int
    bytes_moved: int
    num_nodes: int
    phases: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """All metrics of a run. Times in seconds; ``ettr`` and ``plt`` in [0, 1]."""

    steps: int  # the last committed step
    tokens: int  # tokens of committed steps, each step once
    wall_s: float
    productive_s: float
    goodput_tokens_per_s: float
    ettr: float
    plt: float
    steps_lost: int
    losses: int
    joins: int
    bytes_moved: int
    first_loss: float | None
    final_loss: float | None
    digest: str | None
    recoveries: tuple[Recovery, ...]


def summarise(events: Sequence[Event]) -> Summary:
    """Compute all metrics of a run."""
    commits = committed_steps(events)
    steps = of_kind(events, "step_committed")
    digests = [str(e["digest"]) for e in of_kind(events, "state_digest")]
    digests += [
        str(e["state_digest"]) for e in of_kind(events, "run_finished") if "state_digest" in e
    ]
    return Summary(
        steps=max(commits, default=0),
        tokens=committed_tokens(events),
        wall_s=wall_s(events),
        productive_s=productive_s(events),
        goodput_tokens_per_s=goodput(events),
        ettr=ettr(events),
        plt=plt(events),
        steps_lost=steps_lost(events),
        losses=len(of_kind(events, "node_lost")),
        joins=len(of_kind(events, "node_joined")),
        bytes_moved=sum(int(e["bytes_moved"]) for e in of_kind(events, "reconfigured")),
        first_loss=steps[0]["loss"] if steps else None,
        final_loss=steps[-1]["loss"] if steps else None,
        digest=digests[-1] if digests else None,
        recoveries=recoveries(events),
    )


def committed_steps(events: Iterable[Event]) -> dict[int, Event]:
    """Map each committed step to its last commit. Commits undone by a rollback are left out."""
    counted: dict[int, Event] = {}
    for event in of_kind(events, "step_committed"):
        step = int(event["step"])
        while counted and next(reversed(counted)) > step:  # a rollback undid the later steps
            counted.popitem()
        counted[step] = event  # keeps the steps in ascending order
    return counted


def committed_tokens(events: Iterable[Event]) -> int:
    """Tokens of all committed steps, each step once."""
    return sum(int(event["tokens"]) for event in committed_steps(events).values())


def steps_lost(events: Iterable[Event]) -> int:
    """The number of commits that were undone: their step was committed again, or rolled back."""
    committed = of_kind(events, "step_committed")
    return len(committed) - len(committed_steps(committed))


def lives(events: Sequence[Event]) -> list[list[Event]]:
    """The events split into lives; each ``run_started`` begins a new life."""
    cut: list[list[Event]] = []
    for event in events:
        starts = event["event"] == "run_started"
        if starts or not cut:
            cut.append([])
        cut[-1].append(event)
    return cut


def wall_s(events: Sequence[Event]) -> float:
    """Seconds from the first to the last event of each life, summed over all lives."""
    return sum(max(0.0, moment(life[-1]) - moment(life[0])) for life in lives(events))


def productive_s(events: Iterable[Event]) -> float:
    """Seconds spent on committed steps that were not undone."""
    return sum(float(event["wall_s"]) for event in committed_steps(events).values())


def goodput(events: Sequence[Event]) -> float:
    """Committed tokens per wall second."""
    seconds = wall_s(events)
    return committed_tokens(events) / seconds if seconds > 0 else 0.0


def ettr(events: Sequence[Event]) -> float:
    """Productive time over wall time, in [0, 1]."""
    seconds = wall_s(events)
    return min(1.0, productive_s(events) / seconds) if seconds > 0 else 0.0


def plt(events: Sequence[Event]) -> float:
    """Portion of lost tokens: mean over MoE layers of lost routed copies / (tokens x top-k).

    If the last event has ``plt`` (as ``run_finished`` does), this value is returned. Otherwise PLT
    is computed from ``expert_restored`` events, with ``num_layers`` (layers with experts) and
    ``top_k`` from ``run_started``.

    Source: the PLT formula of the partial-expert-checkpoint paper.
    """
    if events and "plt" in events[-1]:
        return float(events[-1]["plt"])
    lost = sum(float(e["lost_copies"]) for e in of_kind(events, "expert_restored"))
    if lost == 0:
        return 0.0
    header: dict[str, Any] = {}
    for event in of_kind(events, "run_started"):
        header.update(event)
    copies = committed_tokens(events) * int(header.get("top_k", 1))
    return lost / (copies * int(header.get("num_layers", 1))) if copies else 0.0


def recoveries(events: Sequence[Event]) -> tuple[Recovery, ...]:
    """The recovery after each lost node that has a following reconfiguration.

    Events of one recovery are matched by node and generation, not by their order in the file: a
    commit is written only once it is durable, possibly after later events.
    """
    found = []
    for lost in of_kind(events, "node_lost"):
        built = _reconfiguration_of(events, lost)
        if built is not None:
            found.append(_recovery(events, lost, built))
    return tuple(found)


def _reconfiguration_of(events: Sequence[Event], lost: Event) -> Event | None:
    later = [e for e in of_kind(events, "reconfigured") if moment(e) >= moment(lost)]
    named = [e for e in later if lost["node"] in e.get("lost", (lost["node"],))]
    return named[0] if named else None


def _recovery(events: Sequence[Event], lost: Event, built: Event) -> Recovery:
    fault = _fault_of(events, lost)
    since = moment(lost if fault is None else fault)
    commits = of_kind(events, "step_committed")
    before = max((int(e["step"]) for e in commits if moment(e) < moment(lost)), default=0)
    after = min(
        (
            e
            for e in commits
            if e["generation"] >= built["generation"] and moment(e) >= moment(lost)
        ),
        key=moment,
        default=None,
    )
    return Recovery(
        node=int(lost["node"]),
        cause=str(lost["cause"]),
        step=int(built["step"]) + 1 if "step" in built else before + 1,
        detect_s=None if fault is None else max(0.0, moment(lost) - since),
        rebuild_s=float(built["wall_s"]),
        back_s=None if after is None else moment(after) - since,
        steps_lost=0 if after is None else max(0, before + 1 - int(after["step"])),
        moves=int(built["moves"]),
        bytes_moved=int(built["bytes_moved"]),
        num_nodes=int(built["num_nodes"]),
        phases={str(k): float(v) for k, v in built["phases"].items()},
    )


def _fault_of(events: Sequence[Event], lost: Event) -> Event | None:
    earlier = [
        e
        for e in of_kind(events, "fault_injected")
        if e["node"] == lost["node"] and e["kind"] in _LETHAL and moment(e) <= moment(lost)
    ]
    return earlier[-1] if earlier else None
