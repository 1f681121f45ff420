"""The plan for the next members, and the PREPARE that tells them of it (rules 22-26)."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache

from lazarus.checkpoint.restoring.policy import Hold
from lazarus.checkpoint.restoring.restore_choice import Fail
from lazarus.control.cluster.roster import workers_of
from lazarus.control.cluster.state import Control, Decision, Phase
from lazarus.control.cluster.transition import Transition
from lazarus.control.commit import commits
from lazarus.control.messages import (
    Move,
    Prepare,
    Seat,
)
from lazarus.control.plans.healing import heals_behind, split_moves
from lazarus.control.plans.planning import plan_for
from lazarus.control.plans.verdict import holders, needs, schedule_moves
from lazarus.control.ports import TellAll
from lazarus.control.reconfiguration.holding import give_up, hold
from lazarus.control.saving import saves
from lazarus.control.saving.losses import (
    checkpoint_awaited,
    place_of_checkpoint,
    restores_for,
)
from lazarus.failure import Cause, Failure
from placement import InfeasiblePlacementError, Plan

_HEAL_BEFORE_BYTES = 64 << 20  # up to here per rank, heal = "auto" heals before RESUME


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
    return _ordered_to_prepare(state, transition, plan, fed=fed, back=back)


def _fed(
    state: Control, transition: Transition, *, seats: tuple[Seat, ...], feeders: tuple[Seat, ...]
) -> tuple[int, ...]:
    """Feeder indices that receive the dense state: of joiners and of outvoted workers."""
    place = {seat.worker: i for i, seat in enumerate(seats)} if transition.joiners else {}
    joining = [place[w] for w in workers_of(state, transition.joiners)]
    odd = [i for i, seat in enumerate(feeders) if seat.worker in transition.outvoted]
    return tuple(sorted({*joining, *odd}))


def _ordered_to_prepare(
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
    tell_all = TellAll(workers=tuple([seat.worker for seat in feeders]), body=order)
    return state, (tell_all,)


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
