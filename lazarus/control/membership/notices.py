"""What is known ahead: nodes that will leave, nodes that are missing, machines that are bad."""

from __future__ import annotations

from dataclasses import replace

from lazarus.control.cluster.roster import node_of, staying
from lazarus.control.cluster.state import Control, Decision
from lazarus.control.commit import commits
from lazarus.control.messages import (
    LeaveRequest,
    MachineJudged,
    NodeEndsMachine,
    NodeNotice,
    NodesAwaited,
)
from lazarus.control.ports import Publish, TellDriver
from lazarus.failure import Cause, Failure, Status


def on_leave(state: Control, worker: str, body: LeaveRequest, *, at_s: float) -> Decision:
    """Mark a node as leaving at its own request; it leaves at the next pause (rule 33)."""
    serial = state.roster.workers[worker].node
    return _mark_leaving(
        state, serial, cause=body.cause or "leave", notice_s=body.notice_s, at_s=at_s
    )


def on_notice(state: Control, body: NodeNotice, *, at_s: float) -> Decision:
    """Mark a node as leaving because the cluster says so.

    A notice for a node that has not said hello yet is kept until it does.
    """
    found = node_of(state, body.node_key)
    if found is None:  # the node may still be starting
        notices = {**state.roster.notices, body.node_key: body}
        return replace(state, roster=replace(state.roster, notices=notices)), ()
    cause = body.cause or "drain"
    return _mark_leaving(state, found[0], cause=cause, notice_s=body.notice_s, at_s=at_s)


def on_awaited(state: Control, body: NodesAwaited, *, at_s: float) -> Decision:
    """Note how many nodes the driver is missing or starting.

    Published when more nodes are missing than before. If no node is left and none can be started
    any more, the run ends.
    """
    idle_s = None if body.coming else at_s if state.waiting.idle_s is None else state.waiting.idle_s
    known = state.waiting.awaited_told if body.missing or body.coming else 0
    highest = max(known, body.missing)
    waiting = replace(state.waiting, awaited=body, idle_s=idle_s, awaited_told=highest)
    state = replace(state, waiting=waiting)
    if body.is_hopeless and not staying(state):
        return _nobody_starts(state, body.reason, at_s=at_s)
    if body.missing <= known:
        return state, ()
    fields = {"generation": state.generation, "missing": body.missing, "reason": body.reason}
    return state, (Publish(t=at_s, event="nodes_awaited", fields=fields),)


def _nobody_starts(state: Control, reason: str, *, at_s: float) -> Decision:
    """End the run: there is no node, and no further one will start."""
    failure = Failure(
        cause=Cause.NODE,
        error="StoppedError" if state.resumed else "StartupError",
        message=f"no node starts any more: {reason}",
    )
    status: Status = "short" if state.resumed else "failed"
    return commits.end(state, status=status, failure=failure, at_s=at_s)


def on_judged(state: Control, body: MachineJudged, *, at_s: float) -> Decision:
    """Publish that a machine is suspect or banned, because nodes die or do not start there."""
    name = "node_banned" if body.is_banned else "machine_suspect"
    fields = {"generation": state.generation, "machine": body.machine, "reason": body.reason}
    return state, (Publish(t=at_s, event=name, fields=fields),)


def _mark_leaving(
    state: Control, serial: int, *, cause: str, notice_s: float, at_s: float
) -> Decision:
    node = state.roster.nodes[serial]
    if node.leaving:
        return state, ()
    fields = {
        "generation": state.generation,
        "node": serial,
        "cause": cause,
        "notice_s": notice_s,
    }
    nodes = {**state.roster.nodes, serial: replace(node, leaving=cause)}
    return replace(state, roster=replace(state.roster, nodes=nodes)), (
        Publish(t=at_s, event="drain_notice", fields=fields),
        TellDriver(body=NodeEndsMachine(node_key=node.key)),
    )
