"""What the controller starts by itself: whatever its state calls for after any event. PURE."""

from __future__ import annotations

from dataclasses import replace

from lazarus.control.cluster.roster import candidates, leaving, staying
from lazarus.control.cluster.state import Control, Decision, Phase
from lazarus.control.commit import commits, finalizing
from lazarus.control.membership import members, patience, suspicion
from lazarus.control.messages import (
    Pause,
)
from lazarus.control.ports import (
    TellAll,
)
from lazarus.control.reconfiguration import holding, preparing, repair, resuming
from lazarus.control.reconfiguration import reconfigure as change
from lazarus.control.saving import saves
from lazarus.failure import Cause, Failure


def settle(state: Control, *, at_s: float) -> Decision:
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
        case Phase.ALIGNING if preparing.waited_enough(state, at_s=at_s):
            return preparing.prepare(state, at_s=at_s)
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
    return holding.hold(state, reason=message, at_s=at_s)


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
