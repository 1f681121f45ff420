"""The present state of a run, computed from its record alone. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lazarus.basics.format import loss_text, plural, seconds_text
from lazarus.record import metrics
from lazarus.record.events import Event, moment, of_kind

Phase = Literal["STARTING", "RUNNING", "RECONFIGURING", "HOLDING", "ENDED"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """The state of a run at one moment. Ages in seconds; None if unknown."""

    phase: Phase
    ended: str  # "finished", "stopped", "short", "failed"; empty while the run lasts
    cause: str  # who or what ended the run, see ``lazarus.failure``; empty for a good end
    error: str  # message of the failure that ended the run
    generation: int
    step: int
    steps: int  # train.steps; 0 if the record does not say
    loss: float | None
    nodes: int
    wanted: int
    floor: int | None
    requested_floor: int | None
    commit_age_s: float | None
    news_age_s: float | None
    reconfiguration_s: float | None
    reconfiguration_age_s: float | None
    reason: str  # why the run last lacked a quorum
    summary: metrics.Summary


def status_of(events: Sequence[Event], *, now_s: float) -> Status:
    """The state of a run from its events.

    Args:
        events: All events of the record.
        now_s: The time of day in unix seconds. Only the age of the newest event depends on the
            time of day; other ages add differences on the record's own clock.
    """
    life = metrics.lives(events)[-1] if events else []
    commits = of_kind(life, "step_committed")
    started, plans = of_kind(life, "run_started"), of_kind(life, "plan_adopted")
    changes, ends = of_kind(life, "reconfigured"), of_kind(life, "run_finished")
    plan = plans[-1] if plans else {}
    head = started[-1] if started else {}
    last = commits[-1] if commits else None
    change = changes[-1] if changes else None
    newest = max(life, key=moment, default=None)
    quiet_s = None if newest is None else max(0.0, now_s - float(newest["t"]))

    def age_s(event: Event | None) -> float | None:
        if event is None or newest is None or quiet_s is None:
            return None
        return quiet_s + max(0.0, moment(newest) - moment(event))

    return Status(
        phase=_phase(life),
        ended=str(ends[-1].get("status", "finished")) if ends else "",
        cause=str(ends[-1].get("cause", "")) if ends else "",
        error=str(ends[-1].get("error", "")) if ends else "",
        generation=max((int(e["generation"]) for e in life), default=0),
        step=max(metrics.committed_steps(events), default=0),
        steps=int(head.get("steps", 0)),
        loss=None if last is None else last["loss"],
        nodes=_live_nodes(life),
        wanted=int(head.get("num_nodes", 0)),
        floor=plan.get("floor"),
        requested_floor=plan.get("requested_floor"),
        commit_age_s=age_s(last),
        news_age_s=quiet_s,
        reconfiguration_s=None if change is None else float(change["wall_s"]),
        reconfiguration_age_s=age_s(change),
        reason=str(next((e.get("reason", "") for e in reversed(of_kind(life, "quorum_lost"))), "")),
        summary=metrics.summarise(events),
    )


def _phase(life: Sequence[Event]) -> Phase:
    """The phase after the newest event that changes the phase.

    Commits are not used, since they may be written late.
    """
    telling: dict[str, Phase] = {
        "run_started": "RUNNING",
        "reconfigured": "RUNNING",
        "quorum_regained": "RECONFIGURING",
        "node_lost": "RECONFIGURING",
        "quorum_lost": "HOLDING",
        "run_finished": "ENDED",
    }
    seen = of_kind(life, *telling)
    if not seen:
        return "STARTING"
    return telling[str(seen[-1]["event"])]


def _live_nodes(life: Sequence[Event]) -> int:
    nodes = 0
    for event in life:
        if event["event"] in ("run_started", "step_committed", "reconfigured"):
            nodes = int(event["num_nodes"])
        elif event["event"] == "node_lost":
            nodes -= 1
    return max(0, nodes)


def describe(status: Status) -> str:
    """The status as one line, as ``lazarus status`` prints it."""
    total = f"/{status.steps:,}" if status.steps else ""
    parts = [
        f"phase {status.phase}" + (f" ({_ended(status)})" if status.ended else ""),
        f"generation {status.generation}",
        f"step {status.step:,}{total}",
        f"loss {loss_text(status.loss)}" if status.step else "",
        f"last commit {seconds_text(status.commit_age_s)} ago" if status.commit_age_s else "",
        f"nodes {status.nodes}/{status.wanted}",
    ]
    if status.floor is not None:
        parts.append(f"floor {status.floor}/{status.requested_floor}")
    if status.reconfiguration_s is not None and status.reconfiguration_age_s is not None:
        parts.append(
            f"last reconfiguration {seconds_text(status.reconfiguration_s)}, "
            f"{seconds_text(status.reconfiguration_age_s)} ago"
        )
    parts.append(f"{plural(status.summary.losses, 'node')} lost")
    parts.append(f"{plural(status.summary.steps_lost, 'step')} lost")
    if status.phase == "HOLDING":
        parts.append(f"holding: {status.reason}")
    if status.error:
        parts.append(f"ended: {status.error}")
    return "  ".join(part for part in parts if part)


def _ended(status: Status) -> str:
    return f"{status.ended}, {status.cause}" if status.cause else status.ended
