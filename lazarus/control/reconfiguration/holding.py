"""A run that cannot go on: it holds and waits for nodes, or ends as resumable (rule 26)."""

from __future__ import annotations

from dataclasses import replace

from lazarus.checkpoint.restoring.restore_choice import Fail
from lazarus.control.cluster.state import Control, Decision, Phase
from lazarus.control.commit import commits
from lazarus.control.messages import (
    StartNode,
)
from lazarus.control.ports import Command, Publish, TellDriver
from lazarus.failure import Cause, Failure


def give_up(state: Control, decision: Fail, *, at_s: float) -> Decision:
    """End the run as resumable: the recovery policy allows no way to restore lost experts."""
    details = {"experts": [list(expert) for expert in decision.experts]}
    failure = Failure(
        cause=Cause.NODE,
        error="LostExpertError",
        message=decision.reason,
        way_out="resume from a checkpoint",
        details=details,
    )
    if state.storage.refused:
        failure = replace(
            storage_failure(state, what=decision.reason), error="LostExpertError", details=details
        )
    return commits.end(state, status="short", failure=failure, at_s=at_s)


def storage_failure(state: Control, *, what: str = "the run cannot go on") -> Failure:
    """The failure for a copy that storage does not return and that has no other source."""
    url, operation, said = state.storage.refusal
    return Failure(
        cause=Cause.STORAGE,
        error="CheckpointError",
        message=f"{what}: {said}",
        way_out="see to the storage, then resume the run",
        url=url,
        operation=operation,
    )


def hold(state: Control, *, reason: str, at_s: float, broken: bool = False) -> Decision:
    """Keep the state in memory and wait for nodes (rule 26); published once per reason.

    A run that is being stopped ends instead.

    Args:
        state: The controller's state.
        reason: Why the run holds, for the record.
        at_s: Time of the event in seconds.
        broken: Whether an invariant failed. New nodes then do not end the hold; only a stop, the
            loss of all members or the quorum timeout does.
    """
    if state.ending.stopping:  # a stopping run needs no more nodes
        failure = Failure(cause=Cause.REQUEST, error="StoppedError", message=state.ending.stopping)
        return commits.end(state, status="short", failure=failure, at_s=at_s)
    events: tuple[Command, ...] = ()
    if state.waiting.hold_reason != reason:
        fields = {
            "generation": state.generation,
            "reason": reason,
            "nodes": sorted(state.standing.members),
            "needed": state.config.min_nodes,
            "broken": broken,
        }
        events = (Publish(t=at_s, event="quorum_lost", fields=fields),)
        if state.config.nodes > len(state.roster.nodes):
            events += (TellDriver(body=StartNode(reason=reason)),)
    since = state.phase_s if state.phase is Phase.HOLDING else at_s
    state = replace(
        state,
        phase=Phase.HOLDING,
        phase_s=since,
        waiting=replace(
            state.waiting,
            hold_reason=reason,
            tried=state.transition.next_nodes if state.transition else (),
            broken=state.waiting.broken or broken,
        ),
        transition=None,
    )
    return state, events
