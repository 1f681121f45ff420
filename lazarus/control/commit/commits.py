"""Journals and publishes commits, evaluations and digests, and ends the run."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from msgspec.structs import replace as changed
from numpy.typing import NDArray

from lazarus.checkpoint.restoring.plt import portion_lost
from lazarus.control.cluster.state import Control, Decision, Phase, one_more_stale
from lazarus.control.cluster.transition import Timeline
from lazarus.control.commit.exactly_once import ledger_event
from lazarus.control.commit.measures import measures_of
from lazarus.control.commit.unfired import unfired
from lazarus.control.messages import (
    Ack,
    Depart,
    DigestItem,
    DigestPart,
    Evaluated,
    Heartbeat,
    RunOver,
    Vector,
)
from lazarus.control.plans.tuning import learned
from lazarus.control.ports import Exit, Journal, Publish, Tell, TellDriver
from lazarus.control.vector import StepSums, VectorLayout, advance_history, decode
from lazarus.failure import Cause, Failure, Status


def on_vector(state: Control, body: Vector, *, at_s: float) -> Decision:
    """Keep the first vector of a step; it is journaled and published within ``flush_s``."""
    if body.generation != state.resumed or body.step <= state.step:
        return one_more_stale(state), ()
    if body.step in state.committed.known:
        return state, ()
    known = {**state.committed.known, body.step: changed(body, at_s=at_s)}
    state = replace(state, committed=replace(state.committed, known=known))
    state, commands = close_timeline(state, at_s=at_s)
    if at_s - state.committed.flushed_s >= state.config.timeouts.flush_s:
        state, more = flush(state, at_s=at_s)
        commands += more
    return state, commands


def flush(state: Control, *, at_s: float) -> Decision:
    """Journal all commits that directly follow the last one, then publish them (rule 28)."""
    ready: list[Vector] = []
    while (vector := state.committed.known.get(state.step + len(ready) + 1)) is not None:
        ready.append(vector)
    if not ready:
        return state, ()
    entry = {
        "kind": "commits",
        "term": state.term,
        "commits": [
            {
                "generation": vector.generation,
                "step": vector.step,
                "lanes": base64.b64encode(vector.lanes).decode(),
                "wall_s": vector.wall_s,
                "at_s": vector.at_s,
            }
            for vector in ready
        ],
    }
    published = tuple(event for vector in ready for event in commit_events(state, vector))
    sums = [sums_of(state, vector) for vector in ready]
    history = state.committed.history
    for one in sums:
        history = advance_history(history, one.counts)
    last = ready[-1]
    state = replace(
        state,
        step=last.step,
        committed=replace(
            state.committed,
            history=history,
            step_s=last.wall_s,
            flushed_s=at_s,
            known={step: v for step, v in state.committed.known.items() if step > last.step},
            newest=last,
        ),
        standing=replace(state.standing, base_plan=state.standing.plan),
        blame=replace(state.blame, errors=()),
        waiting=replace(state.waiting, gone_s=None),
    )
    state, events = learned(state, sums, at_s=at_s)
    return state, (Journal(entry=entry), *published, *events)


def sums_of(state: Control, vector: Vector) -> StepSums:
    """Decode a vector of the newest RESUMEd generation."""
    layout = VectorLayout(
        world_size=len(state.standing.seats),
        num_layers=state.standing.shape[0],
        num_experts=state.standing.shape[1],
    )
    return decode(layout, np.frombuffer(vector.lanes, dtype="<f8"))


def counts_of(state: Control, lanes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Routed copies, float64 [L, E], of a step of the newest RESUMEd generation."""
    layers, experts = state.standing.shape
    world = len(state.standing.seats)
    layout = VectorLayout(world_size=world, num_layers=layers, num_experts=experts)
    return lanes[layout.counts].reshape(layers, experts)


def commit_events(state: Control, vector: Vector) -> tuple[Publish, ...]:
    """The events of one commit, computed from its vector alone (rule 11)."""
    sums = sums_of(state, vector)
    events = (_step_committed(state, vector, sums), *_skipped(vector, sums))
    if not state.config.ledger:
        return events
    return *events, ledger_event(state, vector, sums)


def _skipped(vector: Vector, sums: StepSums) -> tuple[Publish, ...]:
    """The event for a committed step that changed no state, because a value was not finite."""
    if not sums.skips:
        return ()
    fields = {"generation": vector.generation, "step": vector.step, "reason": sums.skip_reason}
    return (Publish(t=vector.at_s, event="step_skipped", fields=fields),)


def _step_committed(state: Control, vector: Vector, sums: StepSums) -> Publish:
    layers, experts = state.standing.shape
    world = len(state.standing.seats)
    layout = VectorLayout(world_size=world, num_layers=layers, num_experts=experts)
    measures = measures_of(layout, np.frombuffer(vector.lanes, dtype="<f8"))
    logged = {
        "metrics": {name: mean for name, (mean, _) in measures.items()},
        "metric_weights": {name: weight for name, (_, weight) in measures.items()},
    }
    return Publish(
        t=vector.at_s,
        event="step_committed",
        fields={
            "generation": vector.generation,
            "step": vector.step,
            "loss": None if not np.isfinite(sums.loss) else sums.loss,
            "tokens": int(sums.count),
            "samples": sums.samples,
            "num_nodes": len(state.standing.seats) // state.config.ranks_per_node,
            "wall_s": vector.wall_s,
            **(logged if measures else {}),
        },
    )


def on_evaluated(state: Control, body: Evaluated, *, at_s: float) -> Decision:
    """Publish the held-out loss after a step, once per step."""
    if body.generation != state.resumed or body.step == state.committed.evaluated:
        return one_more_stale(state), ()
    state = replace(state, committed=replace(state.committed, evaluated=body.step))
    state, commands = flush(state, at_s=at_s)
    fields = {
        "generation": body.generation,
        "step": body.step,
        "loss": body.loss_sum / body.count if body.count > 0 else None,
        "count": int(body.count),
    }
    entry = {"kind": "evaluated", "term": state.term, "step": body.step}
    event = Publish(t=at_s, event="evaluated", fields=fields)
    return state, (*commands, Journal(entry=entry), event)


def close_timeline(state: Control, *, at_s: float) -> Decision:
    """Publish the timeline of a recovery, at the first commit after its RESUME."""
    timeline = state.timeline
    if timeline is None or state.phase is not Phase.RUNNING:
        return state, ()
    marks = dict(timeline.marks)
    marks["redo"] = max(0.0, at_s - marks.pop("resumed_s"))
    fields = _timeline_fields(state, timeline, marks, end_s=at_s)
    return replace(state, timeline=None), (Publish(t=at_s, event="reconfigured", fields=fields),)


def _timeline_fields(
    state: Control, timeline: Timeline, marks: Mapping[str, float], *, end_s: float
) -> dict[str, Any]:
    return {
        "generation": state.resumed,
        "reason": timeline.reason,
        "wall_s": max(0.0, end_s - timeline.trigger_s),
        "phases": {name: round(seconds, 6) for name, seconds in marks.items()},
        "num_nodes": len(state.standing.members),
        "moves": timeline.moves,
        "moves_behind": timeline.behind,
        "bytes_moved": timeline.bytes_moved,
        "attempts": timeline.attempts,
        "lost": list(timeline.lost),
        "joined": list(timeline.joined),
        "step": state.standing.lineage[-1][1] if state.standing.lineage else 0,
    }


def on_heartbeat(state: Control, worker: str, body: Heartbeat, *, at_s: float) -> Decision:
    """Note the worker's progress, and acknowledge journaled commits to the worker."""
    known = state.roster.workers[worker]
    moved = body.progress != known.progress
    known = replace(
        known,
        progress=body.progress,
        progress_s=at_s if moved else known.progress_s,
        waiting=body.waiting,
        step=body.step,
    )
    workers = {**state.roster.workers, worker: known}
    state = replace(state, roster=replace(state.roster, workers=workers))
    if body.acked < state.step:
        return state, (Tell(worker=worker, body=Ack(step=state.step)),)
    return state, ()


def combine_digests(items: Iterable[DigestItem]) -> str:
    """The state digest: SHA-256 over (name, NUL, SHA-256 of the item), sorted by global name.

    An item's own SHA-256 covers its name, dtype, shape and little-endian bytes.
    """
    whole = hashlib.sha256()
    for item in sorted(items, key=lambda item: item.name):
        whole.update(item.name.encode() + b"\0" + item.sha256)
    return whole.hexdigest()


def on_digest_part(state: Control, worker: str, body: DigestPart, *, at_s: float) -> Decision:
    """Store one rank's items; the last rank's items complete the digest, which is published."""
    if body.generation != state.resumed or worker not in state.standing.seats:
        return one_more_stale(state), ()
    parts = {**state.ending.digests.get(body.step, {}), worker: body.items}
    if set(parts) < set(state.standing.seats):
        digests = {**state.ending.digests, body.step: parts}
        return replace(state, ending=replace(state.ending, digests=digests)), ()
    digest = combine_digests(item for items in parts.values() for item in items)
    digests = {step: part for step, part in state.ending.digests.items() if step > body.step}
    state = replace(state, ending=replace(state.ending, digests=digests, digest=digest))
    fields = {"generation": state.resumed, "step": body.step, "digest": digest}
    return state, (Publish(t=at_s, event="state_digest", fields=fields),)


def end(state: Control, *, status: Status, failure: Failure | None, at_s: float) -> Decision:
    """End the run: journal and publish its result, release all workers, and tell the driver.

    Args:
        state: The controller's state.
        status: How the run ended.
        failure: Why the run did not finish; None if it finished or the user stopped it.
        at_s: Time of the end in seconds.
    """
    state, commands = flush(state, at_s=at_s)
    fields = {
        "generation": state.resumed,
        "status": status,
        "cause": _cause(status, failure),
        "steps": state.step,
        "wall_s": at_s - state.started_s,
        "state_digest": state.ending.digest,
        "plt": portion_lost(
            state.saving.plt.lost_by_expert(), routed=state.committed.routed.tolist()
        ),
        "error": "" if failure is None else failure.message,
        "stale_messages": state.rejected.stale,
        "refused_messages": state.rejected.num_refused,
    }
    result = {"steps": state.step, "state_digest": state.ending.digest}
    entry = {
        "kind": "end",
        "term": state.term,
        "at_s": at_s,
        "fields": fields,
        "status": status,
        "error": "" if failure is None else failure.to_json(),
        "result": json.dumps(result),
    }
    state = replace(state, phase=Phase.ENDED, phase_s=at_s)
    left = tuple(Tell(worker=w, body=Depart(reason=status)) for w in state.roster.workers)
    commands += unfired(state, at_s=at_s)
    return state, (*commands, Journal(entry=entry), *last_words(entry), *left, Exit())


def _cause(status: Status, failure: Failure | None) -> str:
    if failure is not None:
        return str(failure.cause)
    return str(Cause.REQUEST) if status == "stopped" else ""


def last_words(entry: Mapping[str, Any]) -> tuple[Publish, TellDriver]:
    """The last event and the message to the driver, from the journal entry of the end."""
    failure = Failure.from_json(entry["error"]) if entry["error"] else None
    over = RunOver(status=entry["status"], failure=failure, result=entry["result"])
    event = Publish(t=float(entry["at_s"]), event="run_finished", fields=entry["fields"])
    return event, TellDriver(body=over)
