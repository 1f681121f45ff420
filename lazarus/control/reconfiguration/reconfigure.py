"""A reconfiguration, from the claim of a generation to PREPARE or a hold (rules 16-27)."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache

from msgspec.structs import replace as changed

from lazarus.checkpoint.restoring.policy import Hold
from lazarus.checkpoint.restoring.restore_choice import Fail
from lazarus.control.cluster.roster import all_in, candidates, leaving, workers_of
from lazarus.control.cluster.state import Control, Decision, Phase, one_more_stale
from lazarus.control.cluster.transition import Transition
from lazarus.control.commit import commits
from lazarus.control.commit.exactly_once import num_samples_in
from lazarus.control.messages import (
    Align,
    Aligned,
    Fence,
    Move,
    Prepare,
    Report,
    Seat,
    StartNode,
    Vector,
)
from lazarus.control.plans.healing import heals_behind, split_moves
from lazarus.control.plans.planning import history_of, plan_for
from lazarus.control.plans.verdict import aligned_alike, holders, needs, schedule_moves, verdict
from lazarus.control.ports import Command, Journal, Publish, TellAll, TellDriver
from lazarus.control.reconfiguration import parting, repair
from lazarus.control.reconfiguration.timeline import mark, with_timeline
from lazarus.control.saving import saves
from lazarus.control.saving.losses import (
    checkpoint_awaited,
    place_of_checkpoint,
    restart_step,
    restores_for,
)
from lazarus.errors import BrokenInvariantError
from lazarus.failure import Cause, Failure
from placement import InfeasiblePlacementError, Plan

_HEAL_BEFORE_BYTES = 64 << 20  # up to here per rank, heal = "auto" heals before RESUME


def begin(state: Control, *, reason: str, at_s: float, planned: bool = False) -> Decision:
    """Claim the next generation and fence the old one.

    Joiners are admitted at the start of the run, at planned reconfigurations, and when fewer than
    ``min_nodes`` members are left.

    Args:
        state: The controller's state.
        reason: Why the run is reconfigured, for journal and record.
        at_s: Time of the event in seconds.
        planned: Whether all ranks have paused for this, or the run was holding.
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
    told = TellAll(workers=workers_of(state, voters + joiners), body=order)
    return state, (*commands, Journal(entry=claim), told)


def _room(state: Control, voters: tuple[int, ...]) -> int:
    limit = state.config.max_nodes
    if limit is None:
        return len(state.roster.nodes)
    return max(0, limit - len(voters) + len(leaving(state, voters)))


def on_report(state: Control, worker: str, body: Report, *, at_s: float) -> Decision:
    """Store a worker's report; the last report leads to the verdict (rule 19)."""
    transition = state.transition
    if (
        state.phase is not Phase.FENCING
        or transition is None
        or body.generation != transition.generation
    ):
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

    The steps that such a rank reports are void. It has already read the state of the rollback, and
    takes it at ALIGN, so its report is changed to the step of the rollback. Reports need no
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
    told: tuple[Command, ...] = ()
    if transition.reason == parting.STALLED:
        state, event = parting.judge_stall(state, reports, at_s=at_s)
        told = (event,)
    published = max(state.step, state.config.start_step)
    try:
        result = verdict(reports, known=_evidence(state), published=published)
    except BrokenInvariantError as broken:
        state, commands = hold(state, reason=str(broken), at_s=at_s, broken=True)
        return state, (*told, *commands)
    state, commands = commits.flush(state, at_s=at_s)
    state = mark(state, "release", at_s - transition.phase_s)
    transition = replace(transition, step=result.step, phase_s=at_s)
    state = replace(state, phase=Phase.ALIGNING, phase_s=at_s, transition=transition)
    lanes = result.vector.lanes if result.vector else b""
    order = Align(
        generation=transition.generation, step=result.step, commit=bool(lanes), lanes=lanes
    )
    return state, (*told, *commands, TellAll(workers=voting, body=order))


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
    transition = state.transition
    if (
        state.phase is not Phase.ALIGNING
        or transition is None
        or body.generation != transition.generation
    ):
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


def prepare(state: Control, *, at_s: float) -> Decision:
    """Plan for the next members and order PREPARE, or hold if there is no plan (rule 26)."""
    transition = state.transition
    assert transition is not None
    nodes = transition.next_nodes
    if len(nodes) < state.config.min_nodes and not state.ending.stopping:
        reason = f"{len(nodes)} of at least {state.config.min_nodes} nodes"
        return hold(state, reason=reason, at_s=at_s)
    try:
        plan = plan_for(state, transition)
    except InfeasiblePlacementError as problem:
        if not state.resumed:  # there is no state yet that a hold would keep
            failure = Failure(cause=Cause.USER_CODE, error="ConfigError", message=str(problem))
            return commits.end(state, status="failed", failure=failure, at_s=at_s)
        return hold(state, reason=str(problem), at_s=at_s)
    return _order(state, transition, plan, at_s=at_s)


def _order(state: Control, transition: Transition, plan: Plan, *, at_s: float) -> Decision:
    nodes = transition.next_nodes
    seats = _seats(state, workers_of(state, nodes))
    feeders = seats + _seats(state, workers_of(state, transition.leavers))
    owners = holders(transition.aligned, feeders)
    wanted = needs(plan, num_seats=len(seats))
    moves, lost = schedule_moves(wanted, owners)
    if lost and state.ending.stopping and len(nodes) < state.config.min_nodes:
        return _cannot_save(state, transition, lost, at_s=at_s)
    restarts = transition.restarts
    if lost and not restarts and checkpoint_awaited(state, transition, plan, lost, at_s=at_s):
        return replace(state, transition=replace(transition, awaits=True)), ()
    decided = restores_for(state, transition, plan, lost, at_s=at_s)
    if isinstance(decided, Fail):
        return give_up(state, decided, at_s=at_s)
    if isinstance(decided, Hold):
        until_s = at_s + decided.for_s
        return replace(state, transition=replace(transition, held_until_s=until_s)), ()
    back = decided.step
    behind: tuple[Move, ...] = ()
    if back is not None:
        moves = ()
    elif not transition.leavers and heals_behind(
        moves,
        mode=state.config.heal,
        record_bytes=state.standing.record_bytes[1],
        before_bytes=_HEAL_BEFORE_BYTES,
    ):
        moves, behind = split_moves(moves, owners=owners, wanted=wanted)
    fed = _fed(state, transition, seats=seats, feeders=feeders)
    moved = len(moves) * state.standing.record_bytes[1] + len(fed) * state.standing.record_bytes[0]
    transition = replace(
        transition,
        plan=plan,
        seats=seats,
        feeders=feeders,
        moves=moves,
        moves_behind=behind,
        restores=decided.restores,
        rollback=back is not None,
        refused=decided.refused,
        step=transition.step if back is None else back,
        moved_bytes=moved,
        phase_s=at_s,
    )
    state = replace(state, phase=Phase.PREPARING, phase_s=at_s, transition=transition)
    return _told_to_prepare(state, transition, plan, fed=fed, back=back)


def _fed(
    state: Control, transition: Transition, *, seats: tuple[Seat, ...], feeders: tuple[Seat, ...]
) -> tuple[int, ...]:
    """Feeder indices that receive the dense state: of joiners and of outvoted workers."""
    place = {seat.worker: i for i, seat in enumerate(seats)} if transition.joiners else {}
    joining = [place[w] for w in workers_of(state, transition.joiners)]
    odd = [i for i, seat in enumerate(feeders) if seat.worker in transition.outvoted]
    return tuple(sorted({*joining, *odd}))


def _told_to_prepare(
    state: Control, transition: Transition, plan: Plan, *, fed: tuple[int, ...], back: int | None
) -> Decision:
    """Send PREPARE to all feeders; ``back`` is the step of a rollback, None without one."""
    nodes, seats, feeders = transition.next_nodes, transition.seats, transition.feeders
    standing = tuple(sorted(set(range(len(feeders))).difference(fed)))
    any_aligned = transition.aligned[workers_of(state, transition.voters[:1])[0]]
    order = Prepare(
        generation=transition.generation,
        step=transition.step,
        seats=seats,
        feeders=feeders,
        plan=state.config.plan_text(plan),
        moves=transition.moves,
        moves_behind=transition.moves_behind,
        dense_sources=standing,
        dense_targets=fed if back is None else (),
        scalars=any_aligned.scalars,
        history=any_aligned.history,
        restores=transition.restores,
        speeds=_speeds(state, nodes),
        lineage=lineage_text(state.standing.lineage),
        reload="" if back is None or transition.restarts else place_of_checkpoint(state, back),
        # Only at the start: later, a joiner waiting for slow storage would delay all ranks.
        probe=state.config.probes_place and not state.resumed,
    )
    told = TellAll(workers=tuple([seat.worker for seat in feeders]), body=order)
    return state, (told,)


def waited_enough(state: Control, *, at_s: float) -> bool:
    """Whether a recovery in ALIGNING has waited long enough and ``prepare`` is due.

    It waits for the time set by a recovery policy that holds, or for a checkpoint in flight.
    """
    transition = state.transition
    if transition is not None and transition.held_until_s:
        return at_s >= transition.held_until_s
    if transition is None or not transition.awaits:
        return False
    return not saves.worth_waiting(state, transition, at_s=at_s)


def _seats(state: Control, workers: tuple[str, ...]) -> tuple[Seat, ...]:
    known = state.roster.workers
    return tuple([_seat(w, k.node, k.host, k.keeper) for w in workers for k in (known[w],)])


@lru_cache(maxsize=1 << 15)  # most seats are the same in each generation
def _seat(worker: str, node: int, host: str, keeper: str) -> Seat:
    return Seat(worker=worker, node=node, host=host, keeper=keeper)


def _speeds(state: Control, nodes: tuple[int, ...]) -> tuple[float, ...]:
    weights = [state.tuning.next_speeds.get(node, 1.0) for node in nodes]
    if all(weight == 1.0 for weight in weights):
        return ()
    return tuple(w for w in weights for _ in range(state.config.ranks_per_node))


def lineage_text(lineage: tuple[tuple[int, int], ...]) -> str:
    """The lineage as the JSON text that PREPARE and RESUME carry."""
    return json.dumps([list(pair) for pair in lineage])


def _cannot_save(
    state: Control, transition: Transition, lost: tuple[tuple[int, int], ...], *, at_s: float
) -> Decision:
    """End a run that is stopped while holding and cannot be saved, because experts are lost."""
    standing = max((c.step for c in state.storage.checkpoints), default=None)
    newest = "no checkpoint stands" if standing is None else f"the newest is of step {standing}"
    experts = f"{len(lost)} experts of it have no live replica"
    message = (
        f"{state.ending.stopping}; step {transition.step} cannot be saved: {experts}; {newest}"
    )
    failure = Failure(cause=Cause.REQUEST, error="StoppedError", message=message)
    return commits.end(state, status="short", failure=failure, at_s=at_s)


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
