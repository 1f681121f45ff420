"""Malformed messages, and members that are lost because theirs was dropped. PURE.

A malformed message is dropped, counted and put on record. For a member it is also remembered, until
the next RESUME or until the member sends a good message of the same kind. If the controller then
loses this member because an answer is missing, the machine has not failed: Lazarus itself sent the
malformed message. The loss is treated like an internal error that a rank reports itself (see
``blame``): it counts against its node until a second node has one in the same step.
"""

from __future__ import annotations

from dataclasses import replace

from lazarus.control.cluster.state import Control, Decision, without
from lazarus.control.commit import commits
from lazarus.control.membership import members
from lazarus.control.membership.blame import is_alone, published
from lazarus.control.ports import Command, Publish
from lazarus.failure import Cause, Failure

_SAID = 20  # refusals that are published; the last event has their total number
_REASON_CHARS = 300


def refuse(state: Control, worker: str, message: str, reason: str, *, at_s: float) -> Decision:
    """Drop a malformed message: count it, and publish the first ``_SAID`` of them."""
    state = replace(
        state, rejected=replace(state.rejected, num_refused=state.rejected.num_refused + 1)
    )
    reason = reason[:_REASON_CHARS]
    there = worker in state.roster.workers
    if (not there and worker in state.standing.seats) if message == "Hello" else there:
        dropped = {**state.rejected.dropped, worker: (message, reason)}
        state = replace(state, rejected=replace(state.rejected, dropped=dropped))
    if state.rejected.num_refused > _SAID:
        return state, ()
    fields = {
        "generation": state.generation,
        "worker": worker,
        "message": message,
        "reason": reason,
    }
    return state, (Publish(t=at_s, event="message_refused", fields=fields),)


def made_good(state: Control, worker: str, message: str) -> Control:
    """Forget a dropped message once the worker has sent a good message of the same kind."""
    if state.rejected.dropped.get(worker, ("", ""))[0] != message:
        return state
    dropped = without(state.rejected.dropped, (worker,))
    return replace(state, rejected=replace(state.rejected, dropped=dropped))


def lose(state: Control, late: tuple[int, ...], *, cause: str, at_s: float) -> Decision:
    """Lose nodes that owe an answer.

    A node whose answer was refused is lost through an internal error, which is published and may
    end the run.
    """
    ours = {node: why for node in late if (why := _why(state, node))}
    others = tuple(node for node in late if node not in ours)
    commands: tuple[Command, ...] = ()
    for node, why in ours.items():
        if node not in state.roster.nodes:
            continue
        failure = _failure(state, node, why)
        state, flushed = commits.flush(state, at_s=at_s)
        event = published(state, failure, event="internal_error", at_s=at_s)
        commands = (*commands, *flushed, event)
        standing = state.standing
        joining = bool(state.resumed and standing.members) and node not in standing.members
        if not joining and not is_alone(state, node, step=failure.step):
            state, over = commits.end(state, status="failed", failure=failure, at_s=at_s)
            return state, (*commands, *over)
        raised = (*state.blame.raised, (node, failure.step))
        state = replace(state, blame=replace(state.blame, raised=raised))
        what = f"Lazarus failed: {why}"
        state, more = members.lose(state, (node,), cause=what, at_s=at_s, is_silent=True)
        commands += more
    state, more = members.lose(state, others, cause=cause, at_s=at_s, is_silent=True)
    return state, (*commands, *more)


def _why(state: Control, node: int) -> str:
    """Which message of the node's workers was refused, and why; empty if none was."""
    known = state.roster.nodes.get(node)
    found = [
        state.rejected.dropped[w]
        for w in (known.workers if known else ())
        if w in state.rejected.dropped
    ]
    return "" if not found else f"{found[0][0]} of its worker was refused: {found[0][1]}"


def _failure(state: Control, node: int, why: str) -> Failure:
    (worker,) = [w for w in state.roster.nodes[node].workers if w in state.rejected.dropped][:1]
    return Failure(
        cause=Cause.INTERNAL,
        error="InternalError",
        message=f"node {node} waits for an answer to what was thrown away: {why}",
        node=node,
        rank=state.standing.seats.index(worker) if worker in state.standing.seats else -1,
        step=state.step + 1,
        phase=state.phase.value,
    )
