"""A reconfiguration, from the claim of a generation until all have aligned (rules 16-21)."""

from __future__ import annotations

from dataclasses import replace

from msgspec.structs import replace as changed

from lazarus.control.cluster.roster import all_in, candidates, leaving, workers_of
from lazarus.control.cluster.state import Control, Decision, Phase, attempt_in, one_more_stale
from lazarus.control.cluster.transition import Transition
from lazarus.control.commit import commits
from lazarus.control.commit.exactly_once import num_samples_in
from lazarus.control.messages import (
    Align,
    Aligned,
    Fence,
    Report,
    Vector,
)
from lazarus.control.plans.planning import history_of
from lazarus.control.plans.verdict import aligned_alike, verdict
from lazarus.control.ports import Command, Journal, TellAll
from lazarus.control.reconfiguration import parting, repair
from lazarus.control.reconfiguration.holding import hold, storage_failure
from lazarus.control.reconfiguration.preparing import prepare
from lazarus.control.reconfiguration.timeline import mark, with_timeline
from lazarus.control.saving.losses import (
    place_of_checkpoint,
    restart_step,
)
from lazarus.errors import BrokenInvariantError


def begin(state: Control, *, reason: str, at_s: float, planned: bool = False) -> Decision:
    """Claim the next generation and fence the old one.

    Joiners are admitted at the start of the run, at planned reconfigurations, and when fewer than
    ``min_nodes`` members are left.

    Args:
        state: The controller's state.
        reason: Why the run is reconfigured, for journal and record.
        at_s: Time of the event in seconds.
        planned: True if all ranks have paused for this, or the run was holding; False after a
            loss.
    """
    state, commands = commits.flush(state, at_s=at_s)
    voters = tuple(sorted(state.standing.members))
    waiting = candidates(state)
    restarts = bool(state.resumed and not voters)
    if not state.resumed or restarts:
        voters, joiners = waiting, waiting[:0]
    elif state.ending.stopping:
        joiners = ()
    elif planned or len(voters) < state.config.min_nodes:
        joiners = waiting[: _room(state, voters)]
    else:
        joiners = ()
    leavers = leaving(state, voters)
    generation = state.generation + 1
    transition = Transition(
        generation=generation,
        voters=voters,
        joiners=joiners,
        leavers=leavers,
        phase_s=at_s,
        reason=reason,
        restarts=restarts,
    )
    claim = {
        "kind": "claim",
        "term": state.term,
        "generation": generation,
        "members": list(voters),
        "joiners": list(joiners),
        "leavers": list(leavers),
        "reason": reason,
    }
    state = with_timeline(state, reason=reason, at_s=at_s)
    state = replace(
        state,
        generation=generation,
        phase=Phase.FENCING,
        phase_s=at_s,
        transition=transition,
        pausing=replace(state.pausing, paused={}, pause_sent=False),
        blame=replace(state.blame, suspicion_s=None, complaints=()),
        ending=replace(state.ending, finalized={}, digests={}),
        agreement=replace(state.agreement, undecided=False),
    )
    order = Fence(generation=generation)
    fence = TellAll(workers=workers_of(state, voters + joiners), body=order)
    return state, (*commands, Journal(entry=claim), fence)


def _room(state: Control, voters: tuple[int, ...]) -> int:
    limit = state.config.max_nodes
    if limit is None:
        return len(state.roster.nodes)
    return max(0, limit - len(voters) + len(leaving(state, voters)))


def on_report(state: Control, worker: str, body: Report, *, at_s: float) -> Decision:
    """Store a worker's report; the last report leads to the verdict (rule 19)."""
    transition = attempt_in(state, Phase.FENCING, generation=body.generation)
    if transition is None:
        return one_more_stale(state), ()
    body = _on_history(state, _of_now(state, body))
    transition = replace(transition, reports={**transition.reports, worker: body})
    state = replace(state, transition=transition)
    if state.roster.workers[worker].node in transition.voters:
        # Vectors stay known even if this attempt or the reporting rank is lost (rules 19, 21).
        fresh = {v.step: changed(v, at_s=at_s) for v in body.vectors if v.step > state.step}
        state = replace(
            state, committed=replace(state.committed, known={**fresh, **state.committed.known})
        )
    asked = transition.voters + transition.joiners
    if not all_in(state, asked, transition.reports):
        return state, ()
    return _judge(state, transition, at_s=at_s)


def _of_now(state: Control, body: Report) -> Report:
    """Drop vectors of older generations from a report, except for steps that are committed."""
    sound = [v for v in body.vectors if v.generation == state.resumed or v.step <= state.step]
    return changed(body, vectors=tuple(sound))


def _on_history(state: Control, body: Report) -> Report:
    """Correct the report of a rank that missed the RESUME of the last rollback.

    The steps that such a rank reports are void. It holds the rolled-back state in memory and
    switches to it at ALIGN, so its report must name the step of the rollback. Reports need no
    correction once a later generation has resumed.
    """
    generation, step = state.standing.rolled
    if body.entered >= generation or state.resumed > generation:
        return body
    return changed(body, committed=step, prepared=step, vectors=())


def _judge(state: Control, transition: Transition, *, at_s: float) -> Decision:
    if transition.restarts:
        return _restart(state, transition, at_s=at_s)
    voting = workers_of(state, transition.voters)
    reports = {worker: transition.reports[worker] for worker in voting}
    if failure := parting.ranks_parted(reports, state.standing.seats):
        return commits.end(state, status="failed", failure=failure, at_s=at_s)
    events: tuple[Command, ...] = ()
    if transition.reason == parting.STALLED:
        state, event = parting.judge_stall(state, reports, at_s=at_s)
        events = (event,)
    published = max(state.step, state.config.start_step)
    try:
        result = verdict(reports, known=_evidence(state), published=published)
    except BrokenInvariantError as broken:
        state, commands = hold(state, reason=str(broken), at_s=at_s, broken=True)
        return state, (*events, *commands)
    state, commands = commits.flush(state, at_s=at_s)
    state = mark(state, "release", at_s - transition.phase_s)
    transition = replace(transition, step=result.step, phase_s=at_s)
    state = replace(state, phase=Phase.ALIGNING, phase_s=at_s, transition=transition)
    lanes = result.vector.lanes if result.vector else b""
    order = Align(
        generation=transition.generation, step=result.step, commit=bool(lanes), lanes=lanes
    )
    return state, (*events, *commands, TellAll(workers=voting, body=order))


def _restart(state: Control, transition: Transition, *, at_s: float) -> Decision:
    """Align all new nodes at the step of a checkpoint, because all former members are lost."""
    step = restart_step(state)
    if step is None:
        return commits.end(state, status="failed", failure=storage_failure(state), at_s=at_s)
    state = mark(state, "release", at_s - transition.phase_s)
    transition = replace(transition, step=step, phase_s=at_s)
    state = replace(state, phase=Phase.ALIGNING, phase_s=at_s, transition=transition)
    order = Align(
        generation=transition.generation, step=step, reload=place_of_checkpoint(state, step)
    )
    return state, (TellAll(workers=workers_of(state, transition.voters), body=order),)


def _evidence(state: Control) -> dict[int, Vector]:
    """Vectors that a verdict may need, by step, with that of the newest journaled commit."""
    newest = (
        {}
        if state.committed.newest is None
        else {state.committed.newest.step: state.committed.newest}
    )
    return newest | dict(state.committed.known)


def on_aligned(state: Control, worker: str, body: Aligned, *, at_s: float) -> Decision:
    """Store a worker's ALIGNED; the last one leads to comparison, plan and PREPARE."""
    transition = attempt_in(state, Phase.ALIGNING, generation=body.generation)
    if transition is None:
        return one_more_stale(state), ()
    transition = replace(transition, aligned={**transition.aligned, worker: body})
    state = replace(state, transition=transition)
    if not all_in(state, transition.voters, transition.aligned):
        return state, ()
    if not state.resumed:
        own = workers_of(state, transition.voters)
        if failure := parting.models_differ(transition.aligned, own):
            return commits.end(state, status="failed", failure=failure, at_s=at_s)
    if odd := aligned_alike(transition.aligned, at_start=not state.resumed):
        return hold(state, reason=odd, at_s=at_s, broken=True)
    state, commands = repair.judge(state, transition, at_s=at_s)
    if state.phase is Phase.ENDED:
        return state, commands
    assert state.transition is not None
    transition = state.transition
    body = next(iter(transition.aligned.values()))
    state = mark(state, "align", at_s - transition.phase_s)
    state = replace(
        state,
        standing=replace(
            state.standing,
            shape=(body.num_layers, body.num_experts),
            top_k=body.top_k,
            num_samples=num_samples_in(body.scalars),
            record_bytes=(body.dense_bytes, body.expert_bytes),
        ),
        committed=replace(state.committed, history=history_of(body)),
    )
    state, more = prepare(state, at_s=at_s)
    return state, commands + more


def overdue(state: Control, *, at_s: float) -> tuple[int, ...]:
    """Nodes whose answer to a transition is overdue, by serial: no progress for ``report_s``."""
    transition = state.transition
    if transition is None:
        return ()
    waited_for: tuple[str, ...]
    if state.phase is Phase.FENCING:
        everyone = workers_of(state, transition.voters + transition.joiners)
        waited_for = tuple(w for w in everyone if w not in transition.reports)
    elif state.phase is Phase.ALIGNING:
        voting = workers_of(state, transition.voters)
        waited_for = tuple(w for w in voting if w not in transition.aligned)
    elif state.phase is Phase.PREPARING:
        # A worker that waits inside a collective is delayed by another worker.
        waited_for = tuple(
            s.worker
            for s in transition.feeders
            if s.worker not in transition.ready and not state.roster.workers[s.worker].waiting
        )
    else:
        return ()
    limit_s = state.config.timeouts.report_s
    late = (
        state.roster.workers[w].node
        for w in waited_for
        if at_s - max(transition.phase_s, state.roster.workers[w].progress_s) > limit_s
    )
    return tuple(sorted(set(late)))
