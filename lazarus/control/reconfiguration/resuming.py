"""The last step of a reconfiguration: RESUME once all ranks are ready (rules 24 and 25). PURE."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import asdict, astuple, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lazarus.control.cluster.poison import awaited
from lazarus.control.cluster.roster import workers_of
from lazarus.control.cluster.state import (
    Control,
    Decision,
    Phase,
    attempt_in,
    one_more_stale,
    without,
)
from lazarus.control.cluster.transition import Transition
from lazarus.control.commit import commits
from lazarus.control.messages import Depart, Ready, Resume, StorageProblem
from lazarus.control.plans.planning import adoption
from lazarus.control.ports import Command, Journal, Publish, TellAll
from lazarus.control.reconfiguration import repair
from lazarus.control.reconfiguration.holding import hold
from lazarus.control.reconfiguration.preparing import lineage_text
from lazarus.control.reconfiguration.reconfigure import begin
from lazarus.control.reconfiguration.timeline import mark_resume
from lazarus.control.saving import adapting, saves
from lazarus.control.saving.losses import (
    bill_restores,
    differently_read,
    over_budget,
    place_of_checkpoint,
    plt_of,
    restored_entry,
    with_versions_read,
)
from lazarus.failure import Cause, Failure, Status
from placement import Plan


def on_ready(state: Control, worker: str, body: Ready, *, at_s: float) -> Decision:
    """Store a worker's READY; the last one leads to RESUME (rule 25)."""
    transition = attempt_in(state, Phase.PREPARING, generation=body.generation)
    if transition is None:
        return one_more_stale(state), ()
    plan = transition.plan
    assert plan is not None
    if body.plan_digest != plan.digest:
        return hold(state, reason=f"plan digest differs on {worker}", at_s=at_s, broken=True)
    transition = replace(transition, ready={**transition.ready, worker: body})
    return settle(replace(state, transition=transition), at_s=at_s)


def settle(state: Control, *, at_s: float) -> Decision:
    """RESUME if all workers are ready and no launcher's report is awaited.

    The run ends if a node cannot use the checkpoint place, and the reconfiguration begins again if
    ranks read different versions of an expert.
    """
    transition = state.transition
    assert transition is not None
    missing = len(transition.ready) < len(transition.feeders)
    if missing or not all(seat.worker in transition.ready for seat in transition.feeders):
        return state, ()
    if troubled := _cannot_store(state, transition):
        return _without_place(state, troubled, at_s=at_s)
    if odd := differently_read(transition):
        state = replace(
            state, storage=replace(state.storage, readable={**state.storage.readable, **odd})
        )
        return begin(state, reason="damaged_copy", at_s=at_s)
    if _awaits_word(state, at_s=at_s):
        return replace(state, transition=replace(transition, awaits_word=True)), ()
    plan = transition.plan
    assert plan is not None
    transition = with_versions_read(transition)
    return _resume(state, transition, plan, at_s=at_s)


def _awaits_word(state: Control, *, at_s: float) -> bool:
    """Whether to wait for a launcher's report that may show that the next step is poisoned."""
    unsure = awaited(state.blame.deaths, state.blame.unexplained, step=state.step)
    return any(at_s - gone.at_s <= state.config.timeouts.news_s for gone in unsure)


def _cannot_store(state: Control, transition: Transition) -> dict[int, StorageProblem]:
    """Nodes that reported, before the first step, that they cannot use the checkpoint place."""
    if state.resumed:
        return {}
    return {
        state.roster.workers[worker].node: body.place
        for worker, body in transition.ready.items()
        if body.place is not None
    }


def _without_place(
    state: Control, troubled: Mapping[int, StorageProblem], *, at_s: float
) -> Decision:
    """End the run before its first step, because nodes cannot use the checkpoint place."""
    first = troubled[min(troubled)]
    names = " and ".join(str(node) for node in sorted(troubled))
    what = f"{first.operation} {first.url}: {first.reason}"
    failure = Failure(
        cause=Cause.STORAGE,
        error="StorageError",
        message=f"the checkpoint place cannot be used from node {names}: {what}",
        way_out="set checkpoint.url to a place that every node can write to and read from",
        node=min(troubled),
        url=first.url,
        operation=first.operation,
    )
    status: Status = "failed" if state.config.resume is None else "short"
    return commits.end(state, status=status, failure=failure, at_s=at_s)


def _resume(state: Control, transition: Transition, plan: Plan, *, at_s: float) -> Decision:
    entry = _entry(state, transition, plan)
    if transition.rollback:
        if not transition.restarts:  # else ALIGNED had the history
            state = replace(
                state,
                committed=replace(state.committed, history=_reloaded_history(state, transition)),
            )
        entry["history"] = base64.b64encode(
            state.committed.history.astype("<f8").tobytes()
        ).decode()
    state = mark_resume(state, transition, at_s=at_s)
    adapted = adapting.at_resume(state, plan)
    entry["adapted"] = [] if adapted is None else list(astuple(adapted))
    before = state
    bills, state = bill_restores(state, transition, at_s=at_s)
    state, repaired = repair.at_resume(state, transition, at_s=at_s)
    over = bool(bills) and over_budget(state)
    if over:
        state = replace(state, saving=replace(state.saving, plt_spent=plt_of(state)))
    double = over or (state.saving.doubling and not _has_committed(state, transition))
    entry["double_k"] = double
    state = _resumed(state, transition, plan, at_s=at_s)
    state = replace(state, saving=replace(state.saving, adapted=adapted, doubling=double))
    orders = _orders_to_resume(before, state, transition, plan)
    events = _resume_events(before, state, transition, plan, at_s=at_s)
    return state, (Journal(entry=entry), *orders, *events, *bills, *repaired)


def _resumed(state: Control, transition: Transition, plan: Plan, *, at_s: float) -> Control:
    """The controller's state after RESUME, in phase RUNNING."""
    nodes = transition.next_nodes
    lineage = (*state.standing.lineage, (transition.generation, transition.step))
    return replace(
        state,
        phase=Phase.RUNNING,
        phase_s=at_s,
        resumed=transition.generation,
        step=transition.step if transition.rollback else max(state.step, transition.step),
        saving=replace(
            state.saving,
            saves=saves.after_resume(state, lineage),
            ordered=min(state.saving.ordered, transition.step),
        ),
        standing=replace(
            state.standing,
            past_seats=saves.seats_remembered(state),
            members=nodes,
            seats=tuple([seat.worker for seat in transition.seats]),
            seat_nodes=tuple([seat.node for seat in transition.seats]),
            rolled=(transition.generation, transition.step)
            if transition.rollback
            else state.standing.rolled,
            plan=plan,
            base_plan=plan if state.standing.base_plan is None else state.standing.base_plan,
            lineage=lineage,
        ),
        tuning=replace(state.tuning, speeds=_weights(state, nodes), streaks={}),
        pausing=replace(state.pausing, wants=""),
        committed=replace(
            state.committed,
            known={},
            newest=None if transition.rollback else state.committed.newest,
        ),
        rejected=replace(state.rejected, dropped={}),
        storage=replace(state.storage, readable={}),
        transition=None,
        waiting=replace(state.waiting, hold_reason=""),
        roster=replace(
            state.roster,
            nodes=without(state.roster.nodes, transition.leavers),
            workers=without(state.roster.workers, workers_of(state, transition.leavers)),
        ),
    )


def _orders_to_resume(
    before: Control, state: Control, transition: Transition, plan: Plan
) -> list[Command]:
    """RESUME for the workers of the new generation, and Depart for those of leaving nodes."""
    order = Resume(
        generation=transition.generation,
        step=transition.step,
        plan_digest=plan.digest,
        lineage=lineage_text(state.standing.lineage),
        double_k=state.saving.doubling,
        save_all=saves.none_stands(state),
        halt=bool(state.ending.stopping),
        **({} if state.saving.adapted is None else asdict(state.saving.adapted)),
    )
    orders: list[Command] = [TellAll(workers=state.standing.seats, body=order)]
    if departed := workers_of(before, transition.leavers):
        orders.append(TellAll(workers=departed, body=Depart(reason="left the run")))
    return orders


def _has_committed(state: Control, transition: Transition) -> bool:
    """Whether a step was committed since the previous RESUME, so that its orders are in force."""
    return not state.standing.lineage or transition.step > state.standing.lineage[-1][1]


def _entry(state: Control, transition: Transition, plan: Plan) -> dict[str, Any]:
    """The journal entry of a RESUME."""
    nodes = transition.next_nodes
    return {
        "kind": "resume",
        "term": state.term,
        "generation": transition.generation,
        "step": transition.step,
        "nodes": list(nodes),
        "seats": [seat.worker for seat in transition.seats],
        "seat_nodes": [seat.node for seat in transition.seats],
        "speeds": [[n, w] for n, w in sorted(_weights(state, nodes).items())],
        "plan": plan.to_dict(),
        "shape": list(state.standing.shape),
        "record_bytes": list(state.standing.record_bytes),
        "restores": [restored_entry(restore) for restore in transition.restores],
        "rollback": transition.rollback,
        "top_k": state.standing.top_k,
        "num_samples": state.standing.num_samples,
    }


def _weights(state: Control, nodes: tuple[int, ...]) -> dict[int, float]:
    """The share weights of these nodes from now on; only weights below 1 are listed."""
    found = [
        (node, state.tuning.next_speeds[node]) for node in nodes if node in state.tuning.next_speeds
    ]
    return {node: weight for node, weight in found if weight < 1.0}


def _reloaded_history(state: Control, transition: Transition) -> NDArray[np.float64]:
    """The load history that the ranks read from the checkpoint, float64 [3, L, E]."""
    body = next(iter(transition.ready.values()))
    return np.frombuffer(body.history, dtype="<f8").reshape((3, *state.standing.shape))


def _resume_events(
    before: Control, state: Control, transition: Transition, plan: Plan, *, at_s: float
) -> tuple[Publish, ...]:
    generation, events = transition.generation, []
    fields: Mapping[str, Any]
    if transition.restarts:
        fields = {
            "generation": generation,
            "step": transition.step,
            "from_step": before.step,
            "checkpoint": place_of_checkpoint(state, transition.step).rpartition(" ")[0],
        }
        events.append(Publish(t=at_s, event="run_restarted", fields=fields))
    if before.waiting.hold_reason:
        fields = {"generation": generation, "nodes": list(state.standing.members)}
        events.append(Publish(t=at_s, event="quorum_regained", fields=fields))
    if not before.resumed:
        fields = {
            "schema": 1,
            "run": state.config.run_id,
            "num_nodes": len(state.standing.members),
            "world_size": len(state.standing.seats),
            "steps": state.config.steps,
            "start_step": transition.step,
            "nodes": list(state.standing.members),
            "num_layers": state.standing.shape[0],
            "num_experts": state.standing.shape[1],
            "top_k": state.standing.top_k,
        }
        fields = {"generation": generation, **fields}
        events.append(Publish(t=at_s, event="run_started", fields=fields))
        if state.config.resume:
            fields = {**fields, "checkpoint": state.config.resume}
            events.append(Publish(t=at_s, event="run_resumed", fields=fields))
    for node in transition.joiners:
        events.append(
            Publish(t=at_s, event="node_joined", fields={"generation": generation, "node": node})
        )
    for node in transition.leavers:
        events.append(
            Publish(t=at_s, event="node_left", fields={"generation": generation, "node": node})
        )
    events += adoption(state, transition, plan, at_s=at_s)
    return (*events, *adapting.adapted_events(state, before.saving.adapted, at_s=at_s))
