"""Failed collectives: whom to suspect when nobody has died (rule 16)."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from lazarus.control import commits, membership
from lazarus.control import transition as change
from lazarus.control.messages import Suspicion
from lazarus.control.ports import Command
from lazarus.control.state import Control, Phase
from lazarus.failure import Cause, Failure

MAX_ERRORS = 3  # generations in a row that end in an error without a death and without a commit

AGAIN = "collectives fail again and again"

Result = tuple[Control, tuple[Command, ...]]


def on_suspicion(state: Control, worker: str, body: Suspicion, *, at_s: float) -> Result:
    """A failed collective usually precedes the news of a death by milliseconds: wait for it."""
    if body.bad_source:
        return _on_bad_source(state, body, at_s=at_s)
    steady = state.phase in (Phase.RUNNING, Phase.RECONNECTING)
    current = state.resumed if steady else state.generation
    if not (steady or state.phase is Phase.PREPARING) or body.generation != current:
        return replace(state, stale=state.stale + 1), ()
    node = state.workers[worker].node
    if node not in state.complaints:
        state = replace(state, complaints=(*state.complaints, node))
    if state.suspicion_s is None:
        state = replace(state, suspicion_s=at_s)
    return state, ()


def _on_bad_source(state: Control, body: Suspicion, *, at_s: float) -> Result:
    """A copy that was chosen for a restore cannot be read: choose again without it."""
    if not state.resumed:
        failure = Failure(
            cause=Cause.STORAGE, error="CheckpointError", message=f"cannot start: {body.error}"
        )
        return commits.end(state, status="failed", failure=failure, at_s=at_s)
    state = replace(state, bad_sources=state.bad_sources | {body.bad_source})
    if state.phase is not Phase.PREPARING or body.generation != state.generation:
        return state, ()
    return change.begin(state, reason="damaged_copy", at_s=at_s)


def is_due(state: Control, *, at_s: float) -> bool:
    """Whether the news of a death would have come by now."""
    grace = state.config.suspicion_grace_s
    return state.suspicion_s is not None and at_s - state.suspicion_s >= grace


def settle(state: Control, *, at_s: float) -> Result:
    """Try again with the same members; a pair that fails again and again loses its higher serial.

    Both ends of a broken link see the error first, all others because these two give up.
    """
    errors = (*state.errors, state.complaints[:2])
    state = replace(state, errors=errors, complaints=())
    taking_part = set(state.members)
    if state.transition is not None:
        taking_part |= set(state.transition.next_nodes)
    if len(errors) < MAX_ERRORS or len(taking_part) < 2:
        return change.begin(state, reason="collective_error", at_s=at_s)
    odd = culprit(errors, alive=taking_part)
    return membership.lose(state, (odd,), cause=AGAIN, at_s=at_s)


def culprit(errors: tuple[tuple[int, ...], ...], *, alive: set[int]) -> int:
    """The higher serial of the two nodes that were first to complain most often."""
    times = Counter(node for pair in errors for node in pair if node in alive)
    ranked = sorted(times, key=lambda node: (-times[node], node))
    return max(ranked[:2] or alive)
