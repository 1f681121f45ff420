"""Measures the seconds of each phase of a recovery, over all attempts. PURE."""

from __future__ import annotations

from dataclasses import replace

from lazarus.control.cluster.state import Control
from lazarus.control.cluster.transition import Timeline, Transition


def with_timeline(state: Control, *, reason: str, at_s: float) -> Control:
    """Start the timeline of a recovery, or count one more attempt of the recovery under way."""
    if not state.resumed:
        return state
    line = state.timeline
    if line is None:
        return replace(state, timeline=Timeline(reason=reason, trigger_s=at_s))
    return replace(state, timeline=replace(line, attempts=line.attempts + 1))


def mark(state: Control, name: str, seconds: float) -> Control:
    """Add seconds to a phase of the recovery under way; no effect if there is none."""
    line = state.timeline
    if line is None:
        return state
    marks = {**line.marks, name: line.marks.get(name, 0.0) + max(0.0, seconds)}
    return replace(state, timeline=replace(line, marks=marks))


def mark_resume(state: Control, transition: Transition, *, at_s: float) -> Control:
    """Add the time of PREPARING: the slowest rank's groups and transfer, and the rest as "plan"."""
    line = state.timeline
    if line is None:
        return state
    ready = transition.ready.values()
    groups = max(body.groups_s for body in ready)
    transfer = max(body.transfer_s for body in ready)
    state = mark(state, "plan", at_s - transition.phase_s - groups - transfer)
    state = mark(state, "groups", groups)
    state = mark(state, "transfer", transfer)
    assert state.timeline is not None
    marks = {**state.timeline.marks, "resumed_s": at_s}
    line = replace(
        state.timeline,
        marks=marks,
        moves=line.moves + len(transition.moves),
        behind=len(transition.moves_behind),
        bytes_moved=line.bytes_moved + transition.moved_bytes,
        joined=line.joined + transition.joiners,
    )
    return replace(state, timeline=line)
