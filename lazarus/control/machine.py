"""The control plane's entry point: ``decide`` maps (state, event) to (next state, commands)."""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

from lazarus.control.cluster import evidence
from lazarus.control.cluster.poison import HUNG
from lazarus.control.cluster.roster import candidates, leaving, node_of, staying
from lazarus.control.cluster.state import Control, Decision, Phase, one_more_stale
from lazarus.control.commit import commits, finalizing
from lazarus.control.commit.unfired import names_a_node
from lazarus.control.membership import blame, checks, members, patience, refusals, suspicion
from lazarus.control.messages import (
    Aligned,
    Body,
    DigestPart,
    DriverHello,
    Evaluated,
    FaultFired,
    Finalized,
    Go,
    Healed,
    Heartbeat,
    Hello,
    Injected,
    InjectFault,
    KillController,
    LeaveRequest,
    MachineJudged,
    NodeEndsMachine,
    NodeNotice,
    NodesAwaited,
    Pause,
    Paused,
    Ready,
    Repaired,
    ReplicaMismatch,
    Report,
    ShareReported,
    StartNode,
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
    Journal,
    ManifestDone,
    Publish,
    StreamClosed,
    Tell,
    TellAll,
    TellDriver,
    Tick,
    WorkerSaid,
    each,
)
from lazarus.control.reconfiguration import reconfigure as change
from lazarus.control.reconfiguration import repair, resuming
from lazarus.control.saving import saves
from lazarus.failure import Cause, Failure

_ENDS_NODES = frozenset({"kill", "stop", "stall", "cut", "crash"})  # faults, unless limited by for=


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
    state, more = _settle(state, at_s=event.at_s)
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
            return members.on_leave(state, worker, body, at_s=at_s)
        case FaultFired():
            return _on_fault(state, worker, body, at_s=at_s)
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
            return members.on_awaited(state, body, at_s=at_s)
        case MachineJudged():
            return members.on_judged(state, body, at_s=at_s)
        case NodeNotice():
            return members.on_notice(state, body, at_s=at_s)
        case StopRun():
            return _on_stop(state, body, at_s=at_s)
        case Injected():
            return _on_injected(state, body, at_s=at_s)
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


def _on_fault(state: Control, worker: str, body: FaultFired, *, at_s: float) -> Decision:
    go = Tell(worker=worker, body=Go(spec=body.spec))
    ends: tuple[Command, ...] = ()
    if body.kind in _ENDS_NODES and ",for=" not in body.spec:
        key = state.roster.nodes[state.roster.workers[worker].node].key
        ends = (TellDriver(body=NodeEndsMachine(node_key=key)),)
    if (worker, body.number) in state.injected.struck:  # an earlier controller process handled it
        return state, (*ends, go)
    if body.spec in state.injected.fired_specs and not names_a_node(body.spec):
        return state, (Tell(worker=worker, body=Go(spec=body.spec, is_done=True)),)
    struck = {"worker": worker, "number": body.number, "spec": body.spec}
    entry = {"kind": "fault", "term": state.term, **struck}
    state = replace(
        state,
        injected=replace(
            state.injected,
            struck=state.injected.struck | {(worker, body.number)},
            fired_specs=state.injected.fired_specs | {body.spec},
        ),
    )
    serial = state.roster.workers[worker].node
    fields = {
        "generation": state.generation,
        "node": serial,
        "kind": body.kind,
        "step": body.step,
        "phase": body.phase,
        "spec": body.spec,
    }
    commands: list[Command] = [
        Journal(entry=entry),
        Publish(t=at_s, event="fault_injected", fields=fields),
        go,
    ]
    if body.kind == "join":
        order = StartNode(reason=body.spec, is_extra=True)
        commands += [TellDriver(body=order)] * max(1, body.count)
    elif body.kind == "controller":
        commands.append(TellDriver(body=KillController()))
    elif body.kind in ("kill", "stop", "stall", "cut"):
        fired = {**state.injected.fired, serial: at_s}
        state = replace(state, injected=replace(state.injected, fired=fired))
    return state, (*ends, *commands)


def _on_injected(state: Control, body: Injected, *, at_s: float) -> Decision:
    """Record a random fault that the driver injects, with its time.

    The time makes it possible to measure how long the detection takes. A fault that only the
    process itself can show is passed on to the node's workers.
    """
    found = node_of(state, body.node_key)
    serial = None if found is None else found[0]
    fields = {
        "generation": state.generation,
        "node": serial,
        "kind": body.kind,
        "step": state.step + 1,
        "phase": "",
        "spec": body.spec,
    }
    event = Publish(t=at_s, event="fault_injected", fields=fields)
    if found is None or serial not in state.standing.members:
        return state, (event,)
    if body.kind not in ("slow", "crash", "leave"):
        fired = {**state.injected.fired, found[0]: at_s}
        state = replace(state, injected=replace(state.injected, fired=fired))
    if body.kind not in ("stop", "stall", "slow", "crash"):
        return state, (event,)
    if body.kind == "crash":
        doomed = state.injected.doomed | {found[0]}
        state = replace(state, injected=replace(state.injected, doomed=doomed))
    order = InjectFault(kind=body.kind)
    return state, (event, *(Tell(worker=w, body=order) for w in found[1].workers if w))


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


def _settle(state: Control, *, at_s: float) -> Decision:
    """Start whatever the state calls for, regardless of which event led to this state."""
    match state.phase:
        case Phase.GATHERING:
            return _settle_gathering(state, at_s=at_s)
        case Phase.HOLDING:
            return _settle_holding(state, at_s=at_s)
        case Phase.RECONNECTING if state.standing.members:
            return members.settle_reconnecting(state, at_s=at_s)
        case Phase.RUNNING:
            return _settle_running(state, at_s=at_s)
        case Phase.PREPARING if suspicion.is_due(state, at_s=at_s):
            return suspicion.settle(state, at_s=at_s)
        case Phase.PREPARING if state.transition is not None and state.transition.awaits_word:
            return resuming.settle(state, at_s=at_s)
        case Phase.FINALIZING:
            ending, seats = state.ending, state.standing.seats
            written = not (ending.manifest_pending or saves.last_ones_awaited(state, at_s=at_s))
            if set(ending.finalized) >= set(seats) and ending.digest and written:
                return finalizing.finish(state, at_s=at_s)
            if patience.manifest_too_long(state, at_s=at_s):
                return patience.end_without_manifest(state, at_s=at_s)
            if set(ending.finalized) >= set(seats) and ending.manifest_pending:
                return state, ()  # all shares are durable: the lost ranks are not needed any more
        case Phase.ALIGNING if change.waited_enough(state, at_s=at_s):
            return change.prepare(state, at_s=at_s)
        case _:
            pass
    restarting = state.transition is not None and state.transition.restarts
    if state.resumed and not state.standing.members and not restarting:
        return _all_lost(state, at_s=at_s)
    return state, ()


def _settle_gathering(state: Control, *, at_s: float) -> Decision:
    ready = len(candidates(state))
    enough = ready >= state.config.min_nodes
    if ready >= state.config.nodes or (enough and _waited_for_all(state, at_s=at_s)):
        return change.begin(state, reason="start", at_s=at_s)
    patience_s = state.config.timeouts.startup_s + state.config.quorum_timeout_s
    if not enough and state.waiting.idle_s is not None:  # no node is being started
        patience_s = state.waiting.idle_s - state.started_s + state.config.quorum_timeout_s
    if at_s - state.started_s > patience_s:
        return _quorum_timeout(state, live=ready, at_s=at_s)
    return state, ()


def _waited_for_all(state: Control, *, at_s: float) -> bool:
    """Whether the nodes that are ready start the run without the missing ones.

    They wait for ``startup_s`` if machines may still come, and only for ``gather_s`` if there are
    machines but nodes do not start on them.
    """
    if at_s - state.started_s > state.config.timeouts.startup_s:
        return True
    awaited, idle_s = state.waiting.awaited, state.waiting.idle_s
    troubled = awaited is not None and awaited.is_troubled
    return troubled and idle_s is not None and at_s - idle_s > state.config.timeouts.gather_s


def _settle_holding(state: Control, *, at_s: float) -> Decision:
    if not state.standing.members:
        return _settle_gone(state, at_s=at_s)
    if state.ending.stopping:
        return change.begin(state, reason="stop", at_s=at_s, planned=True)
    there = staying(state)
    fresh = len(there) >= state.config.min_nodes and there != state.waiting.tried
    if fresh and not state.waiting.broken:
        return change.begin(state, reason="quorum", at_s=at_s, planned=True)
    if at_s - state.phase_s > state.config.quorum_timeout_s:
        return _quorum_timeout(state, live=len(state.standing.members), at_s=at_s)
    return state, ()


def _settle_running(state: Control, *, at_s: float) -> Decision:
    if not state.standing.members:
        return _all_lost(state, at_s=at_s)
    if suspicion.is_due(state, at_s=at_s):
        return suspicion.settle(state, at_s=at_s)
    if state.agreement.undecided:
        return change.begin(state, reason="replica_mismatch", at_s=at_s)
    if (node := repair.suspect(state)) is not None:
        return _evict_suspect(state, node, at_s=at_s)
    paused, seats = state.pausing.paused, state.standing.seats
    if len(paused) >= len(seats) and set(paused) >= set(seats):
        return _all_paused(state, at_s=at_s)
    if not state.pausing.pause_sent and _pause_is_due(state, at_s=at_s):
        order = Pause(generation=state.resumed)
        state = replace(state, pausing=replace(state.pausing, pause_sent=True))
        return state, (TellAll(workers=seats, body=order),)
    return state, ()


def _evict_suspect(state: Control, node: int, *, at_s: float) -> Decision:
    """Evict a node that was outvoted too often.

    If another node was evicted for the same reason shortly before, end the run instead: then user
    code is at fault.
    """
    state, event = repair.on_suspect(state, node, at_s=at_s)
    if event is None:
        return repair.end_by_user_code(state, node, at_s=at_s)
    cause = f"suspect: {event.fields['reason']}"
    state, commands = members.lose(state, (node,), cause=cause, at_s=at_s)
    return state, (event, *commands)


def _pause_is_due(state: Control, *, at_s: float) -> bool:
    """Whether the ranks must pause between two steps: to stop, to change members, or as wanted."""
    if state.ending.stopping or state.pausing.wants or leaving(state, state.standing.members):
        return True
    waiting = candidates(state)
    limit = state.config.max_nodes
    room = limit is None or len(state.standing.members) < limit
    if not waiting or not room:
        return False
    newest = max(state.roster.nodes[n].joined_s for n in waiting)
    return at_s - newest >= state.config.join_debounce_s


def _all_paused(state: Control, *, at_s: float) -> Decision:
    """All ranks have paused (rule 15): finalize the run, or begin a planned reconfiguration."""
    state, commands = commits.close_timeline(state, at_s=at_s)
    state, more = commits.flush(state, at_s=at_s)
    commands += more
    if set(state.pausing.paused.values()) != {state.step}:
        if not patience.has_lost_vectors(state, at_s=at_s):
            return state, commands  # some commit vectors have not arrived yet
        state, more = change.begin(state, reason="lost_vectors", at_s=at_s)  # reports have them
        return state, commands + more
    if state.step >= state.config.steps or state.ending.stopping:
        state, more = finalizing.begin(state, at_s=at_s)
        return state, commands + more
    if leaving(state, state.standing.members):
        reason = "leave"
    elif candidates(state):
        reason = "join"
    else:
        reason = state.pausing.wants or "pause"
    state, more = change.begin(state, reason=reason, at_s=at_s, planned=True)
    return state, commands + more


def _all_lost(state: Control, *, at_s: float) -> Decision:
    """Every member is lost: hold until new nodes can restart the run from a checkpoint."""
    message = f"every node is lost at step {state.step}"
    if state.ending.stopping:
        failure = Failure(
            cause=Cause.NODE,
            error="StoppedError",
            message=f"{message}; resume from the newest checkpoint",
        )
        return commits.end(state, status="short", failure=failure, at_s=at_s)
    since = at_s if state.waiting.gone_s is None else state.waiting.gone_s
    state = replace(
        state,
        waiting=replace(state.waiting, gone_s=since, broken=False),
        pausing=replace(state.pausing, paused={}, pause_sent=False),
    )
    return change.hold(state, reason=message, at_s=at_s)


def _settle_gone(state: Control, *, at_s: float) -> Decision:
    """Restart from a checkpoint once enough nodes are ready and no manifest is being written."""
    if state.waiting.gone_s is None:  # the last member was lost while the run was held
        return _all_lost(state, at_s=at_s)
    there, config = candidates(state), state.config
    waited = at_s - state.waiting.gone_s
    if waited > config.quorum_timeout_s:
        return _quorum_timeout(state, live=len(there), at_s=at_s)
    writing = state.saving.writing and waited <= config.timeouts.in_flight_s
    if len(there) < config.min_nodes or there == state.waiting.tried or writing:
        return state, ()
    newest = max(state.roster.nodes[node].joined_s for node in there)
    if len(there) < config.nodes and at_s - newest < config.timeouts.restart_debounce_s:
        return state, ()  # more nodes may be about to join
    return change.begin(state, reason="restart", at_s=at_s)


def _quorum_timeout(state: Control, *, live: int, at_s: float) -> Decision:
    if state.waiting.broken:  # an invariant failed: more nodes would not help
        held_s = state.config.quorum_timeout_s
        text = f"the state was held for {held_s:.0f} s: {state.waiting.hold_reason}"
        broken = Failure(cause=Cause.INTERNAL, error="InternalError", message=text)
        return commits.end(state, status="failed", failure=broken, at_s=at_s)
    awaited = state.waiting.awaited.reason if state.waiting.awaited is not None else ""
    details = {
        "awaited": awaited,
        "live": live,
        "needed": state.config.min_nodes,
        "waited_s": state.config.quorum_timeout_s,
    }
    failure = Failure(
        cause=Cause.NODE,
        error="QuorumTimeoutError",
        message=state.waiting.hold_reason or awaited,
        details=details,
    )
    return commits.end(state, status="short", failure=failure, at_s=at_s)


def _driver_gone() -> Failure:
    message = "the driver's process is gone; go on with --resume auto"
    return Failure(cause=Cause.NODE, error="StoppedError", message=message)


def _stopped(reason: str) -> Failure:
    return Failure(cause=Cause.REQUEST, error="StoppedError", message=reason)
