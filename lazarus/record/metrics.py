"""Goodput, ETTR, PLT, recoveries: pure functions of a run's events, shared by every face.

A record may hold several *lives*: a run that was resumed has another ``run_started`` or
``run_resumed``. Time between two lives is nobody's wall time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lazarus.record.events import Event, moment, of_kind

# Kinds of faults that take their node away.
_LETHAL = frozenset({"kill", "stop", "cut", "leave", "stall"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Recovery:
    """One loss and the way back. Times in seconds; None where the record does not say."""

    node: int
    cause: str
    step: int  # the step that was under way
    detect_s: float | None  # from the injected fault to the notice of the loss
    rebuild_s: float  # the reconfiguration itself
    back_s: float | None  # from the injected fault (else the notice) to the next committed step
    steps_lost: int  # committed steps that had to be done again
    moves: int
    bytes_moved: int
    num_nodes: int
    phases: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """What a run did."""

    steps: int  # the last committed step
    tokens: int  # of committed steps, each step once
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
    """Everything at once."""
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
    """Step -> its commit that counts: the last one, where a rollback made a step happen again."""
    counted: dict[int, Event] = {}
    for event in of_kind(events, "step_committed"):
        step = int(event["step"])
        while counted and next(reversed(counted)) > step:  # a rollback voids what came after
            counted.popitem()
        counted[step] = event  # so the steps ascend, and the last one is the highest
    return counted


def committed_tokens(events: Iterable[Event]) -> int:
    """Tokens of the steps that count."""
    return sum(int(event["tokens"]) for event in committed_steps(events).values())


def steps_lost(events: Iterable[Event]) -> int:
    """Commits that do not count in the end, because their step was done again or rolled back."""
    committed = of_kind(events, "step_committed")
    return len(committed) - len(committed_steps(committed))


def missing_steps(events: Iterable[Event]) -> list[int]:
    """Steps between the first and the last committed one that were never committed."""
    steps = committed_steps(events)
    return [s for s in range(min(steps, default=1), max(steps, default=0)) if s not in steps]


def lives(events: Sequence[Event]) -> list[list[Event]]:
    """The record cut where the run was started or resumed."""
    cut: list[list[Event]] = []
    for event in events:
        starts = event["event"] == "run_started"
        if starts or not cut:
            cut.append([])
        cut[-1].append(event)
    return cut


def wall_s(events: Sequence[Event]) -> float:
    """Seconds from start to end, summed over lives."""
    return sum(max(0.0, moment(life[-1]) - moment(life[0])) for life in lives(events))


def productive_s(events: Iterable[Event]) -> float:
    """Seconds spent on the steps that count."""
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

    A record that is finished says it, over all lives of the run. Until then it is computed from
    the restores; ``run_started`` says ``num_layers`` (those with experts) and ``top_k``.

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
    """Every lost node with its detection, its reconfiguration and the next committed step.

    Events of one recovery are paired by node and generation, not by their place in the file: a
    commit is written when its vector is safe, which may be after what followed it.
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
