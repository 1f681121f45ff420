"""The control plane's entry point: ``decide`` maps (state, event) to (next state, commands)."""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

from lazarus.control.cluster import evidence
from lazarus.control.cluster.poison import HUNG
from lazarus.control.cluster.state import Control, Decision, Phase, one_more_stale
from lazarus.control.commit import commits, finalizing
from lazarus.control.membership import (
    blame,
    checks,
    injected_faults,
    members,
    notices,
    patience,
    refusals,
    suspicion,
)
from lazarus.control.messages import (
    Aligned,
    Body,
    DigestPart,
    DriverHello,
    Evaluated,
    FaultFired,
    Finalized,
    Healed,
    Heartbeat,
    Hello,
    Injected,
    LeaveRequest,
    MachineJudged,
    NodeNotice,
    NodesAwaited,
    Paused,
    Ready,
    Repaired,
    ReplicaMismatch,
    Report,
    ShareReported,
    StopRun,
    Suspicion,
    UserError,
    Vector,
    WorkerDied,
)
from lazarus.control.ports import (
    Command,
    DriverGone,
    DriverSaid,
    Event,
    Garbled,
    ManifestDone,
    Publish,
    StreamClosed,
    Tick,
    WorkerSaid,
    each,
)
from lazarus.control.reconfiguration import reconfigure as change
from lazarus.control.reconfiguration import repair, resuming
from lazarus.control.saving import saves
from lazarus.control.settling import settle
from lazarus.failure import Cause, Failure


def decide(state: Control, event: Event) -> Decision:
    """Decide what follows from one event.

    Args:
        state: The controller's whole state before the event.
        event: What happened, with its time ``at_s``.

    Returns:
        The next state, and the commands that the shell carries out in this order. Every event has
        an answer; late and repeated ones leave the state as it was, or are only counted.
    """
    state, commands = decide_at_once(state, event)
    return state, each(commands)


def decide_at_once(state: Control, event: Event) -> Decision:
    """Like ``decide``, but a message for many workers stays one ``TellAll`` command."""
    if state.phase is Phase.ENDED:
        return state, ()
    before = state
    state, commands = _react(state, event)
    if state.phase is Phase.ENDED:
        return state, commands
    state, more = settle(state, at_s=event.at_s)
    if state.phase is Phase.ENDED:
        return state, commands + more
    return state, evidence.journaled(before, state, commands + more)


def _react(state: Control, event: Event) -> Decision:
    match event:
        case WorkerSaid(worker=worker, body=body, at_s=at_s):
            return _worker_said(state, worker, body, at_s=at_s)
        case StreamClosed(worker=worker, at_s=at_s):
            return members.on_closed(state, worker, at_s=at_s, cause=members.STREAM_CLOSED)
        case DriverSaid(body=body, at_s=at_s):
            return _driver_said(state, body, at_s=at_s)
        case ManifestDone(final=True, error=error) if error:
            return finalizing.on_refused_manifest(
                replace(state, ending=replace(state.ending, manifest_pending=False)), event
            )
        case ManifestDone():
            return saves.on_manifest(state, event)
        case Garbled(worker=worker, reason=reason, message=message, at_s=at_s):
            return refusals.refuse(state, worker, message, reason, at_s=at_s)
        case DriverGone(at_s=at_s):
            return commits.end(state, status="short", failure=_driver_gone(), at_s=at_s)
        case Tick(at_s=at_s, slept_s=slept_s):
            if slept_s > 0.0:
                state = members.excuse(state, slept_s=slept_s)
            return _tick(state, at_s=at_s)
    assert_never(event)


def _worker_said(state: Control, worker: str, body: Body, *, at_s: float) -> Decision:
    if isinstance(body, Hello):
        return members.on_hello(state, body, at_s=at_s)
    known = state.roster.workers.get(worker)
    if known is None:  # excluded or never admitted: its messages are dropped (rule 31)
        return one_more_stale(state), ()
    workers = {**state.roster.workers, worker: replace(known, heard_s=at_s)}
    state = replace(state, roster=replace(state.roster, workers=workers))
    if reason := checks.wrong_with(state, worker, body):
        return refusals.refuse(state, worker, type(body).__name__, reason, at_s=at_s)
    if state.rejected.dropped:
        state = refusals.made_good(state, worker, type(body).__name__)
    match body:
        case Heartbeat():
            return commits.on_heartbeat(state, worker, body, at_s=at_s)
        case Vector():
            return commits.on_vector(state, body, at_s=at_s)
        case Suspicion():
            return suspicion.on_suspicion(state, worker, body, at_s=at_s)
        case Report():
            return change.on_report(state, worker, body, at_s=at_s)
        case Aligned():
            return change.on_aligned(state, worker, body, at_s=at_s)
        case Ready():
            return resuming.on_ready(state, worker, body, at_s=at_s)
        case Paused():
            steady = state.phase in (Phase.RUNNING, Phase.RECONNECTING)
            if body.generation != state.resumed or not steady:
                return one_more_stale(state), ()
            paused = {**state.pausing.paused, worker: body.step}
            return replace(state, pausing=replace(state.pausing, paused=paused, paused_s=at_s)), ()
        case LeaveRequest():
            return notices.on_leave(state, worker, body, at_s=at_s)
        case FaultFired():
            return injected_faults.on_fired(state, worker, body, at_s=at_s)
        case DigestPart():
            return commits.on_digest_part(state, worker, body, at_s=at_s)
        case Finalized():
            state = replace(state, ending=replace(state.ending, finalized_s=at_s))
            return finalizing.on_finalized(state, worker, body, at_s=at_s)
        case Healed():
            fields = {
                "generation": body.generation,
                "step": body.step,
                "bytes_moved": body.bytes_received,
            }
            return state, (Publish(t=at_s, event="healed", fields=fields),)
        case ShareReported():
            return saves.on_snapshotted(state, worker, body, at_s=at_s)
        case UserError():
            return blame.on_user_error(state, worker, body, at_s=at_s)
        case Evaluated():
            return commits.on_evaluated(state, body, at_s=at_s)
        case ReplicaMismatch():
            return repair.on_odd(state, body, at_s=at_s)
        case Repaired():
            return repair.on_repaired(state, worker, body, at_s=at_s)
    return state, ()


def _driver_said(state: Control, body: Body, *, at_s: float) -> Decision:
    if reason := checks.wrong_with_drivers(body):
        return refusals.refuse(state, "driver", type(body).__name__, reason, at_s=at_s)
    match body:
        case WorkerDied():
            return blame.on_death(state, body, at_s=at_s)
        case NodesAwaited():
            return notices.on_awaited(state, body, at_s=at_s)
        case MachineJudged():
            return notices.on_judged(state, body, at_s=at_s)
        case NodeNotice():
            return notices.on_notice(state, body, at_s=at_s)
        case StopRun():
            return _on_stop(state, body, at_s=at_s)
        case Injected():
            return injected_faults.on_injected(state, body, at_s=at_s)
        case DriverHello():
            return state, ()
    return state, ()


def _on_stop(state: Control, body: StopRun, *, at_s: float) -> Decision:
    """End the run at once, or note the reason so that it ends at the next pause of all ranks."""
    if body.failure is not None:
        return commits.end(state, status="failed", failure=body.failure, at_s=at_s)
    reason = body.reason or "stopped"
    nothing_waits = state.waiting.broken or not state.standing.members
    nothing_kept = state.phase is Phase.HOLDING and nothing_waits
    if body.now or state.phase is Phase.GATHERING or nothing_kept:
        return commits.end(state, status="short", failure=_stopped(reason), at_s=at_s)
    preempted = state.ending.preempted or body.preempted
    stopping = state.ending.stopping or reason
    ending = replace(state.ending, stopping=stopping, preempted=preempted)
    return replace(state, ending=ending), ()


def _tick(state: Control, *, at_s: float) -> Decision:
    commands: tuple[Command, ...] = ()
    if state.committed.known and at_s - state.committed.flushed_s >= state.config.timeouts.flush_s:
        state, commands = commits.flush(state, at_s=at_s)
    if state.saving.saves:
        state, more = saves.order_manifests(state, at_s=at_s)
        commands += more
    for find, cause in (
        (members.silent, "no heartbeat"),
        (members.stuck, HUNG),
        (change.overdue, "no answer"),
        (patience.finalizing_too_long, HUNG),
    ):
        if late := find(state, at_s=at_s):
            state, more = refusals.lose(state, late, cause=cause, at_s=at_s)
            commands += more
            if state.phase is Phase.ENDED:
                return state, commands
    if suspicion.all_wait(state, at_s=at_s):
        state, more = suspicion.on_stall(state, at_s=at_s)
        commands += more
    return state, commands


def _driver_gone() -> Failure:
    message = "the driver's process is gone; go on with --resume auto"
    return Failure(cause=Cause.NODE, error="StoppedError", message=message)


def _stopped(reason: str) -> Failure:
    return Failure(cause=Cause.REQUEST, error="StoppedError", message=reason)
